// One colour a soft prompt, from its name; the lightness for each theme is in the stylesheet.

/** The hue of a name, 0 to 359. */
export function hueOf(name: string): number {
  let hash = 0x811c9dc5; // FNV-1a
  for (const byte of new TextEncoder().encode(name)) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  // Names that differ in their last letter differ in the low bits alone.
  hash = Math.imul(hash ^ (hash >>> 15), 0x2c1b3c6d) >>> 0;
  hash = Math.imul(hash ^ (hash >>> 12), 0x297a2d39) >>> 0;
  return ((hash ^ (hash >>> 15)) >>> 0) % 360;
}

/** The style that sets the colour `--k` for an element with the class `sp`; grey without a name. */
export function colourOf(name: string | null | undefined): { class: string; style?: Record<string, string> } {
  return name ? { class: "sp", style: { "--h": String(hueOf(name)) } } : { class: "sp base" };
}
