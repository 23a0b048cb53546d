// In which step of the engine each answer got which token: the answers share forward passes.
import { colourOf } from "../ui/colours";
import { count, percent, plural } from "../ui/format";
import { Card, Scroll, Swatch } from "../ui/parts";
import { nameOf } from "./answer";
import type { Answer } from "./model";

const MAX_CELLS = 400;

/** The steps of an answer's tokens. */
const stepsOf = (answer: Answer): number[] => answer.tokens.flatMap((token) => (token.step === null ? [] : [token.step]));

/** Of the steps with several answers still being written, the share that gave a token to all of them; null without such steps. */
export function sharedSteps(answers: Answer[]): number | null {
  const found = answers.map((answer) => new Set(stepsOf(answer))).filter((steps) => steps.size > 0);
  const ranges = found.map((steps) => [Math.min(...steps), Math.max(...steps)] as const);
  const all = new Set(found.flatMap((steps) => [...steps]));
  let several = 0;
  let shared = 0;
  for (const step of all) {
    const active = found.filter((_, index) => ranges[index]![0] <= step && step <= ranges[index]![1]);
    if (active.length < 2) continue;
    several += 1;
    if (active.every((steps) => steps.has(step))) shared += 1;
  }
  return several === 0 ? null : shared / several;
}

export function StepsCard({ answers, base }: { answers: Answer[]; base: string }) {
  const all = answers.flatMap(stepsOf);
  if (all.length === 0) return null;
  const first = Math.min(...all);
  const last = Math.max(...all);
  const shared = sharedSteps(answers);
  const cells = Math.min(last - first + 1, MAX_CELLS);
  return (
    <Card
      title="One batch"
      side={
        <span class="dim3 num">
          steps {count(first)} to {count(last)}: {plural(new Set(all).size, "forward pass", "forward passes")} for {plural(all.length, "token")}
          {shared !== null && `, ${percent(shared)} shared`}
        </span>
      }
    >
      <Scroll label="Steps">
        <div class="pad steps">
          {answers.map((answer) => {
            const name = nameOf(answer.member, base);
            const { class: kind, style } = colourOf(name);
            const mine = new Set(stepsOf(answer));
            const begin = Math.min(...mine);
            const label = answer.model ?? answer.member;
            return (
              <>
                <span class="row nowrap">
                  <Swatch name={name} /> {label}
                </span>
                <span class={`lane ${kind}`} style={style} role="img" aria-label={`${label}: tokens in ${mine.size} steps, from ${begin} to ${Math.max(...mine)}`}>
                  {Array.from({ length: cells }, (_, index) => first + index).map((step) => (
                    <i key={step} class={mine.has(step) ? (step === begin ? "p" : "d") : ""} />
                  ))}
                </span>
              </>
            );
          })}
        </div>
      </Scroll>
    </Card>
  );
}
