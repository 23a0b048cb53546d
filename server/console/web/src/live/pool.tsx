// The block pool: a cell for each block, or for each of a sample of them.
import { useEffect, useRef } from "preact/hooks";
import { theme } from "../app/theme";
import { count, percent } from "../ui/format";
import { Card } from "../ui/parts";
import type { Blocks } from "./model";

const COLUMNS = 96;
const CELL = 8;

/** Colours and words for the bytes of the map. */
const STATES: [string, string][] = [
  ["var(--sunk)", "free"],
  ["var(--line2)", "idle text"],
  ["var(--pool-text)", "text"],
  ["var(--pool-shared)", "text of several rows"],
  ["var(--pool-idle)", "idle soft prompt"],
  ["var(--accent)", "soft prompt"],
  ["var(--heat)", "loading"],
];

export function PoolCard({ blocks }: { blocks: Blocks }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const { map, total, used, idle, size } = blocks;
  const free = total - used - idle;
  const current = theme.value;

  useEffect(() => {
    const element = canvas.current;
    const context = element?.getContext("2d");
    if (!context || !element || map === null) return;
    const cells = Uint8Array.from(atob(map), (letter) => letter.charCodeAt(0));
    element.height = Math.ceil(cells.length / COLUMNS) * CELL;
    const colours = STATES.map(([colour]) => {
      element.style.color = colour;
      return getComputedStyle(element).color;
    });
    cells.forEach((state, index) => {
      context.fillStyle = colours[state] ?? colours[0]!;
      context.fillRect((index % COLUMNS) * CELL, Math.floor(index / COLUMNS) * CELL, CELL - 1.5, CELL - 1.5);
    });
  }, [map, current]);

  return (
    <Card title="Key/value cache" side={<span class="dim3 num">{count(total)} blocks of {size}</span>}>
      <div class="pad stack">
        {map !== null && (
          <>
            <canvas ref={canvas} class="pool" width={COLUMNS * CELL} role="img" aria-label={`${percent(used / total)} in use, ${percent(idle / total)} idle, ${percent(free / total)} free`} />
            <div class="legend" aria-hidden="true">
              {STATES.map(([colour, words]) => (
                <span key={words}>
                  <i class="cell" style={{ background: colour }} /> {words}
                </span>
              ))}
            </div>
          </>
        )}
        <p class="dim num">
          {count(used)} in use, {count(idle)} idle, {count(free)} free
        </p>
      </div>
    </Card>
  );
}
