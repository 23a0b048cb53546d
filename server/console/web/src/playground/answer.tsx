// One answer: its text with the doubt behind each token, the candidates of one token, and how fast it was.
import { useState } from "preact/hooks";
import { colourOf } from "../ui/colours";
import { count, decimals, duration, percent } from "../ui/format";
import { Button, Chip } from "../ui/parts";
import { visible } from "../prompts/inspect";
import { type Answer, total, type Token } from "./model";

const MAX_HEAT = 75;

/** The name in NAME@VERSION; null for the base model. */
export const nameOf = (member: string, base: string): string | null => (member === base ? null : member.split("@")[0]!);

interface Props {
  answer: Answer;
  base: string;
  isRunning: boolean;
  onRemove: () => void;
}

export function AnswerCard({ answer, base, isRunning, onRemove }: Props) {
  const [pointed, setPointed] = useState<number | null>(null);
  const name = nameOf(answer.member, base);
  const { class: kind, style } = colourOf(name);
  const at = pointed ?? mostDoubtful(answer.tokens);
  const token = at === null ? undefined : answer.tokens[at];
  const title = answer.model ?? answer.member;
  return (
    <section class={`card variant ${kind}`} style={style} aria-label={`Answer of ${title}`}>
      <header>
        <i class="sw" aria-hidden="true" />
        <h2>{title}</h2>
        {name === null ? <Chip>no soft prompt</Chip> : answer.member !== title && <Chip kind="alias">{answer.member.split("@")[1] ?? "latest"}</Chip>}
        <span class="grow" />
        <Button small kind="quiet" icon="close" label={`Remove ${answer.member}`} onClick={onRemove} />
      </header>
      <Text answer={answer} at={at} isRunning={isRunning} onPoint={setPointed} />
      {answer.error && <p class="note bad">{answer.error}</p>}
      <Footer answer={answer} />
      {token && token.candidates.length > 0 && <Candidates token={token} />}
    </section>
  );
}

function mostDoubtful(tokens: Token[]): number | null {
  let found: number | null = null;
  tokens.forEach((token, index) => {
    if (token.logprob !== null && token.candidates.length > 0 && (found === null || token.logprob < tokens[found]!.logprob!)) found = index;
  });
  return found;
}

interface TextProps {
  answer: Answer;
  at: number | null;
  isRunning: boolean;
  onPoint: (index: number) => void;
}

function Text({ answer, at, isRunning, onPoint }: TextProps) {
  const { tokens } = answer;

  function onKeyDown(event: KeyboardEvent) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || tokens.length === 0) return;
    event.preventDefault();
    onPoint(Math.min(Math.max((at ?? -1) + step, 0), tokens.length - 1));
  }

  return (
    <div class="out" tabIndex={0} role="group" aria-label="Text; the arrow keys move from token to token" onKeyDown={onKeyDown}>
      {tokens.map((token, index) => (
        <TokenText key={index} token={token} isAt={index === at} onPoint={() => onPoint(index)} />
      ))}
      {isRunning && answer.finish === null && <span class="caret" />}
    </div>
  );
}

function TokenText({ token, isAt, onPoint }: { token: Token; isAt: boolean; onPoint: () => void }) {
  const doubt = token.logprob === null ? 0 : Math.round((1 - Math.exp(token.logprob)) * MAX_HEAT);
  return (
    <span class={`tok ${isAt ? "cur" : ""}`} style={doubt > 3 ? { "--w": `${doubt}%` } : {}} onMouseEnter={onPoint} onClick={onPoint}>
      {token.text}
    </span>
  );
}

function Candidates({ token }: { token: Token }) {
  return (
    <div class="alts">
      <h3 class="hidden">Candidates for {visible(token.text)}</h3>
      <table>
        <thead class="hidden">
          <tr>
            <th scope="col">Token</th>
            <th scope="col">Probability</th>
          </tr>
        </thead>
        <tbody>
          {token.candidates.map((candidate) => (
            <tr key={candidate.text}>
              <th scope="row">
                <code>{visible(candidate.text)}</code>
              </th>
              <td>
                <span class="share" aria-hidden="true">
                  <i class={candidate.text === token.text ? "" : "other"} style={{ width: `${Math.exp(candidate.logprob) * 100}%` }} />
                </span>
                <span class="num">{percent(Math.exp(candidate.logprob), 1)}</span>
              </td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

/** Fewer tokens than this may have arrived together: they say nothing of the speed. */
const MIN_TIMED = 8;

/** Tokens a second after the first one; null if that is not known. */
function speed({ timings, tokens }: Answer): number | null {
  return timings?.decode_seconds && tokens.length >= MIN_TIMED ? (tokens.length - 1) / timings.decode_seconds : null;
}

function Footer({ answer }: { answer: Answer }) {
  const { timings, tokens, finish } = answer;
  const sum = total(tokens);
  const rate = speed(answer);
  return (
    <footer class="num">
      {typeof timings?.first_token_seconds === "number" && (
        <span>
          <b>{duration(timings.first_token_seconds)}</b> first token
        </span>
      )}
      {rate !== null && (
        <span>
          <b>{decimals(rate, 0)}</b> tok/s
        </span>
      )}
      <span>
        <b>{count(tokens.length)}</b> tokens
      </span>
      {sum.count > 0 && (
        <span title="mean log-probability of a token">
          <b>{decimals(sum.logprob / sum.count, 2)}</b> nats a token
        </span>
      )}
      {finish && (
        <span>
          <b>{finish}</b>
        </span>
      )}
    </footer>
  );
}
