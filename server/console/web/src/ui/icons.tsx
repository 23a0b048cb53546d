// Line icons of 16 by 16.
const PATHS = {
  prompts: "M2 3.5h4v2.5H2zM2 10h4v2.5H2zM8.5 3.5H14v2.5H8.5zM8.5 10H14v2.5H8.5z",
  playground: "M2.5 3h11v10h-11zM6.2 3v10M9.8 3v10",
  live: "M2 4h7M2 8h12M2 12h9",
  activity: "M2.5 8a5.5 5.5 0 1 0 1.7-4M2.5 2.5v2.8h2.8M8 5v3.2l2.2 1.4",
  keys: "M9.5 6.5a3 3 0 1 1-6 0 3 3 0 0 1 6 0zM9 8l4.5 4.5M11.5 10.5l1.5-1.5",
  api: "M5.5 4.5 2 8l3.5 3.5M10.5 4.5 14 8l-3.5 3.5",
  evaluations: "M3 13.5V9M6.3 13.5V5M9.7 13.5V7.5M13 13.5V3",
  training: "M2 3c1.5 7 4.5 9.5 12 10",
  search: "M11 7a4 4 0 1 1-8 0 4 4 0 0 1 8 0zM10 10l3.5 3.5",
  close: "M4 4l8 8M12 4l-8 8",
  upload: "M8 11V3M4.8 6 8 2.8 11.2 6M2.5 10.5v3h11v-3",
  sun: "M8 5.2a2.8 2.8 0 1 1 0 5.6 2.8 2.8 0 0 1 0-5.6zM8 1.5v1.3M8 13.2v1.3M1.5 8h1.3M13.2 8h1.3M3.4 3.4l.9.9M11.7 11.7l.9.9M3.4 12.6l.9-.9M11.7 4.3l.9-.9",
  moon: "M13 9.5A5.5 5.5 0 0 1 6.5 3a5.5 5.5 0 1 0 6.5 6.5z",
  auto: "M8 2.5a5.5 5.5 0 1 0 0 11zM8 2.5a5.5 5.5 0 0 1 0 11",
  out: "M6 3H3v10h3M7 8h7M11 5l3 3-3 3",
  back: "M9.5 4 5.5 8l4 4",
  copy: "M5.5 5.5v-3h8v8h-3M2.5 5.5h8v8h-8z",
  plus: "M8 3v10M3 8h10",
  play: "M5 3.5v9l7-4.5z",
  pause: "M5.5 3.5v9M10.5 3.5v9",
  stop: "M4 4h8v8H4z",
} as const;

export type IconName = keyof typeof PATHS;

export function Icon({ name }: { name: IconName }) {
  return (
    <svg class="i" viewBox="0 0 16 16" width="16" height="16" fill="none" stroke="currentColor" stroke-width="1.4" stroke-linejoin="round" stroke-linecap="round" aria-hidden="true">
      <path d={PATHS[name]} />
    </svg>
  );
}

export function Logo() {
  return (
    <svg class="logo" viewBox="0 0 24 24" width="22" height="22" aria-hidden="true">
      {[4, 10, 16].map((y, row) => (
        <>
          <rect x="2" y={y} width="6" height="4" rx="1.2" fill={["#6d5ef0", "#0f9d8a", "#e0762f"][row]} />
          <rect x="10" y={y} width={[12, 8, 10][row]} height="4" rx="1.2" fill="#9698a8" />
        </>
      ))}
    </svg>
  );
}
