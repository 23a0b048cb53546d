// The load of the last hour.
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import { theme } from "../app/theme";
import { count, decimals, duration, percent } from "../ui/format";
import { Card, Spark } from "../ui/parts";
import type { Engine, Point, Stats } from "./model";

const RECENT_POINTS = 30;
const HEIGHT = 190;

interface TileProps {
  title: string;
  value: string;
  note: string;
  values: (number | null)[];
}

function Tile({ title, value, note, values }: TileProps) {
  return (
    <section class="card tile" aria-label={title}>
      <h2>{title}</h2>
      <b class="num">{value}</b>
      <Spark values={values} label={`${title}, the last minutes`} />
      <small class="num">{note}</small>
    </section>
  );
}

export function Tiles({ engine, points }: { engine: Engine; points: Point[] }) {
  const recent = points.slice(-RECENT_POINTS);
  const last = recent.at(-1);
  const { blocks, running, waiting } = engine;
  return (
    <div class="tiles">
      <Tile
        title="Tokens a second"
        value={last ? decimals(last.tokens_per_second, 0) : "–"}
        note={last ? `and ${decimals(last.prompt_tokens_per_second, 0)} of text` : "no point yet"}
        values={recent.map((point) => point.tokens_per_second)}
      />
      <Tile title="Running / waiting" value={`${count(running)} / ${count(waiting)}`} note={`step ${count(engine.step)}`} values={recent.map((point) => point.running)} />
      <Tile title="Blocks in use" value={percent(blocks.used / Math.max(blocks.total, 1))} note={`${count(blocks.idle)} idle, of ${count(blocks.total)}`} values={recent.map((point) => point.used_blocks)} />
      <Tile
        title="First token"
        value={last?.first_token_seconds ? duration(last.first_token_seconds.p50) : "–"}
        note={last?.first_token_seconds ? `p95 ${duration(last.first_token_seconds.p95)}` : "no request in the last seconds"}
        values={recent.map((point) => point.first_token_seconds?.p50 ?? null)}
      />
      <Tile
        title="Prefix cache"
        value={last && last.cache_hit_rate !== null ? percent(last.cache_hit_rate) : "–"}
        note="of text tokens found"
        values={recent.map((point) => point.cache_hit_rate)}
      />
    </div>
  );
}

/** The colour of a custom property. */
function colour(element: Element, name: string): string {
  const probe = element.appendChild(document.createElement("i"));
  probe.style.color = `var(${name})`;
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

export function HourCard({ stats }: { stats: Stats }) {
  const element = useRef<HTMLDivElement>(null);
  const { points, marks } = stats;
  const current = theme.value;
  const newest = points.at(-1)?.at;

  useEffect(() => {
    const host = element.current!;
    const plot = makePlot(host, stats);
    const observer = new ResizeObserver(() => plot.setSize({ width: host.clientWidth, height: HEIGHT }));
    observer.observe(host);
    return () => {
      observer.disconnect();
      plot.destroy();
    };
  }, [newest, marks.length, current]);

  return (
    <Card title="The last hour" side={<span class="dim3">dashes mark promotions, uploads and restarts</span>}>
      <div class="pad stack">
        <div ref={element} class="plot" role="img" aria-label={summary(points)} />
        {marks.length > 0 && (
          <details>
            <summary>{count(marks.length)} marks</summary>
            <ul class="lines">
              {marks.toReversed().map((mark) => (
                <li key={`${mark.at}${mark.text}`}>
                  <span class="any">
                    {mark.kind.replaceAll("_", " ")} {mark.text}
                  </span>
                  <small class="dim3">{new Date(mark.at * 1000).toLocaleTimeString("en")}</small>
                </li>
              ))}
            </ul>
          </details>
        )}
      </div>
    </Card>
  );
}

function makePlot(host: HTMLElement, { points, marks }: Stats): uPlot {
  const [ink, line] = [colour(host, "--ink3"), colour(host, "--line")];
  const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "11px system-ui" };
  const fromZero: uPlot.Range.Function = (_, __, most) => [0, Math.max(most, 1)];
  const series = (label: string, name: string, scale: string) => ({ label, scale, stroke: colour(host, name), width: 1.5, points: { show: false } });
  return new uPlot(
    {
      width: host.clientWidth,
      height: HEIGHT,
      cursor: { y: false },
      legend: { live: false },
      axes: [axis, { ...axis, size: 46 }, { ...axis, side: 1, scale: "sequences", grid: { show: false }, size: 40 }],
      scales: { y: { range: fromZero }, sequences: { range: fromZero } },
      series: [{}, series("tokens a second", "--accent", "y"), series("running", "--ok", "sequences"), series("waiting", "--warn", "sequences")],
      hooks: { draw: [(plot) => drawMarks(plot, marks.map((mark) => mark.at), ink)] },
    },
    [points.map((point) => point.at), points.map((point) => point.tokens_per_second), points.map((point) => point.running), points.map((point) => point.waiting)],
    host,
  );
}

function drawMarks(plot: uPlot, times: number[], stroke: string): void {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.strokeStyle = stroke;
  ctx.setLineDash([3, 3]);
  for (const time of times) {
    const x = Math.round(plot.valToPos(time, "x", true));
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

function summary(points: Point[]): string {
  const most = (values: number[]) => decimals(Math.max(0, ...values), 1);
  return `Load of the last hour: at most ${most(points.map((point) => point.tokens_per_second))} tokens a second, ${most(points.map((point) => point.running))} running, ${most(points.map((point) => point.waiting))} waiting`;
}
