// The curves of one training run or of two: training loss, held-out loss and held-out accuracy by step.
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import type { RunPoints } from "../api/types";
import { theme } from "../app/theme";
import { count, decimals, percent } from "../ui/format";

const HEIGHT = 240;

export type Points = RunPoints["data"];

export interface Curve {
  name: string;
  points: Points;
}

/** The colour of a custom property. */
function colour(element: Element, name: string): string {
  const probe = element.appendChild(document.createElement("i"));
  probe.style.color = `var(${name})`;
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

export function Curves({ curves }: { curves: Curve[] }) {
  const element = useRef<HTMLDivElement>(null);
  const current = theme.value;
  const state = curves.map(({ name, points }) => `${name} ${points.length}`).join();
  useEffect(() => {
    const host = element.current!;
    const plot = makePlot(host, curves);
    const observer = new ResizeObserver(() => plot.setSize({ width: host.clientWidth, height: HEIGHT }));
    observer.observe(host);
    return () => {
      observer.disconnect();
      plot.destroy();
    };
  }, [state, current]);
  return <div ref={element} class="plot" role="img" aria-label={summary(curves)} />;
}

function makePlot(host: HTMLElement, curves: Curve[]): uPlot {
  const [ink, line] = [colour(host, "--ink3"), colour(host, "--line")];
  const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "11px system-ui" };
  const steps = [...new Set(curves.flatMap(({ points }) => points.map(({ step }) => step)))].sort((a, b) => a - b);
  const series: uPlot.Series[] = [{ label: "step" }];
  const columns: (number | null)[][] = [];
  curves.forEach(({ name, points }, index) => {
    const at = new Map(points.map((point) => [point.step, point.values]));
    const prefix = curves.length > 1 ? `${name}: ` : "";
    const dash = index === 0 ? [] : [6, 4];
    for (const [key, label, scale, shade] of [
      ["loss", "training loss", "y", "--ink3"],
      ["eval_loss", "held-out loss", "y", "--accent"],
      ["eval_accuracy", "held-out accuracy", "share", "--ok"],
    ] as const) {
      const values = steps.map((step) => at.get(step)?.[key] ?? null);
      if (values.every((value) => value === null)) continue;
      columns.push(values);
      series.push({ label: prefix + label, scale, stroke: colour(host, shade), width: 1.5, dash, spanGaps: true, points: { show: false } });
    }
  });
  const right = series.some(({ scale }) => scale === "share") ? [{ ...axis, side: 1, scale: "share", grid: { show: false }, size: 44 } as uPlot.Axis] : [];
  const zero: uPlot.Range.Function = (_, __, most) => [0, Math.max(most, 1e-3)];
  return new uPlot(
    {
      width: host.clientWidth,
      height: HEIGHT,
      cursor: { y: false },
      legend: { live: false },
      axes: [axis, { ...axis, size: 50 }, ...right],
      scales: { x: { time: false }, y: { range: zero }, share: { range: () => [0, 1] } },
      series,
    },
    [steps, ...columns] as uPlot.AlignedData,
    host,
  );
}

function summary(curves: Curve[]): string {
  return curves
    .map(({ name, points }) => {
      const last = (key: string) => points.findLast((point) => key in point.values)?.values[key];
      const [loss, held, accuracy] = [last("loss"), last("eval_loss"), last("eval_accuracy")];
      const parts = [
        loss !== undefined && `training loss ${decimals(loss)}`,
        held !== undefined && `held-out loss ${decimals(held)}`,
        accuracy !== undefined && `held-out accuracy ${percent(accuracy, 1)}`,
      ].filter(Boolean);
      return `Curves of ${name} at step ${count(points.at(-1)?.step ?? 0)}: ${parts.join(", ") || "no values"}`;
    })
    .join(". ");
}
