// Numbers, sizes and times as people read them.
const LOCALE = "en";
const whole = new Intl.NumberFormat(LOCALE, { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat(LOCALE, { notation: "compact", maximumFractionDigits: 1 });
const relative = new Intl.RelativeTimeFormat(LOCALE, { numeric: "auto", style: "short" });
const day = new Intl.DateTimeFormat(LOCALE, { dateStyle: "medium", timeStyle: "short" });

export const count = (value: number): string => whole.format(value);
export const compact = (value: number): string => short.format(value);

/** "1 version", "3 versions". */
export const plural = (value: number, noun: string, many = `${noun}s`): string => `${count(value)} ${value === 1 ? noun : many}`;

/** Bytes in decimal units. */
export function bytes(value: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

/** Seconds as milliseconds, seconds, minutes, hours or days. */
export function duration(seconds: number): string {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  if (seconds < 86_400) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86_400)} d`;
}

/** A Unix time in seconds as a distance from now. */
export function ago(time: number): string {
  const seconds = time - Date.now() / 1000;
  const size = Math.abs(seconds);
  if (size < 45) return "just now";
  if (size < 3600) return relative.format(Math.round(seconds / 60), "minute");
  if (size < 86_400) return relative.format(Math.round(seconds / 3600), "hour");
  if (size < 30 * 86_400) return relative.format(Math.round(seconds / 86_400), "day");
  return date(time);
}

export const date = (time: number): string => day.format(time * 1000);

/** A probability or a share as a percentage. */
export const percent = (share: number, digits = 0): string => `${(share * 100).toFixed(digits)}%`;

/** A number with at most `digits` decimals, without trailing zeros. */
export const decimals = (value: number, digits = 3): string =>
  value !== 0 && Math.abs(value) < 10 ** -digits ? value.toExponential(1) : String(Number(value.toFixed(digits)));

const METHODS: Record<string, string> = {
  PROMPT_TUNING: "prompt tuning",
  P_TUNING: "P-tuning",
  PREFIX_TUNING: "prefix tuning",
  MULTITASK_PROMPT_TUNING: "multitask prompt tuning",
  CARTRIDGE: "Cartridge",
  CPT: "CPT",
  LORA: "LoRA",
  IA3: "IA3",
};

/** The name of a PEFT method. */
export const method = (peftType: string): string => METHODS[peftType] ?? peftType;
