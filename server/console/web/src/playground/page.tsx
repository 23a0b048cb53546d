// The playground: one text against up to eight soft prompts and the base model, side by side.
import { signal } from "@preact/signals";
import { useEffect, useState } from "preact/hooks";
import { call, query } from "../api/client";
import type { PromptPage } from "../api/types";
import { route, setParams } from "../app/router";
import { server } from "../app/server";
import { lacking } from "../app/session";
import { MODIFIER } from "../app/shell";
import { count, plural } from "../ui/format";
import { useLoad } from "../ui/load";
import { Button, Empty, ErrorNote, Field, Segments, Swatch } from "../ui/parts";
import { report } from "../ui/toast";
import { AnswerCard, nameOf } from "./answer";
import { LabelsCard } from "./labels";
import { FIRST_KNOBS, faultOf, KNOBS, MAX_MEMBERS, type Mode, MODES, type Question, type Usage } from "./model";
import { ask, run, stop } from "./run";
import { LANGUAGES, snippet, unsupported } from "./snippets";
import { StepsCard } from "./steps";

// Texts stay here while other pages are open; they are neither in the URL nor in storage.
const text = signal("");
const system = signal("");
const labels = signal("\\npositive\n\\nnegative");
const knobs = signal(FIRST_KNOBS);

const setMembers = (members: string[]) => setParams({ with: members.join(",") || null });

/** The question as it stands now. */
function questionNow(): Question {
  const { params } = route.value;
  const given = params.get("with");
  return {
    mode: (params.get("mode") ?? "complete") as Mode,
    text: text.value,
    system: system.value,
    labels: labels.value,
    members: given ? given.split(",") : [],
    knobs: knobs.value,
  };
}

// Pages are drawn after a moment, so the keys ask for what is there when they are pressed, not for what is drawn.
function onKeyDown(event: KeyboardEvent): void {
  const question = questionNow();
  if (event.key === "Enter" && (event.metaKey || event.ctrlKey) && !faultOf(question) && !lacking("generate")) {
    event.preventDefault();
    void ask(question);
  } else if (event.key === "Escape" && run.value?.isRunning) stop();
}

export function PlaygroundPage() {
  const question = questionNow();
  const { members, mode } = question;
  const base = server.value?.model.id ?? "";
  const fault = faultOf(question);
  const current = run.value;
  const isRunning = current?.isRunning ?? false;

  useEffect(() => {
    addEventListener("keydown", onKeyDown);
    return () => removeEventListener("keydown", onKeyDown);
  }, []);
  useEffect(() => stop, []);

  return (
    <>
      <div class="title">
        <h1>Playground</h1>
        <span class="grow" />
        <Copy question={question} fault={fault} />
      </div>
      <form
        class="card pad stack"
        aria-label="Question"
        onSubmit={(event) => {
          event.preventDefault();
          if (!fault) void ask(question);
        }}
      >
        <Segments label="Mode" value={mode} options={MODES} onChange={(value) => setParams({ mode: value === "complete" ? null : value })} />
        {mode === "chat" && <Field label="System message (optional)" value={system.value} onInput={(value) => (system.value = value)} />}
        <Field label={mode === "chat" ? "Message" : "Text"} rows={3} value={text.value} onInput={(value) => (text.value = value)} autoFocus />
        {mode === "classify" && (
          <Field
            label="Labels, one a line"
            rows={3}
            value={labels.value}
            onInput={(value) => (labels.value = value)}
            hint="Each is scored as the continuation of the text. Leave empty for a soft prompt with a head."
          />
        )}
        {(mode === "complete" || mode === "chat") && (
          <div class="knobs">
            {KNOBS.map(([name, hint]) => (
              <Field key={name} label={name} value={knobs.value[name]} onInput={(value) => (knobs.value = { ...knobs.value, [name]: value })} hint={hint} />
            ))}
          </div>
        )}
        <Members members={members} onChange={setMembers} base={base} />
        <div class="row">
          <Button kind="primary" icon="play" submit needs="generate" blocked={fault}>
            Run <kbd>{MODIFIER}↵</kbd>
          </Button>
          <Button icon="stop" blocked={isRunning ? undefined : "Nothing is running."} onClick={stop}>
            Stop
          </Button>
          <span class="dim3" role="status">
            {isRunning ? "Running …" : current?.usage ? usageText(current.usage) : current && !current.error ? "Finished." : ""}
          </span>
        </div>
      </form>
      {current?.error && <RunError error={current.error} />}
      {current && !current.error && <Answers onRemove={(member) => setMembers(members.filter((one) => one !== member))} base={base} />}
      {!current && <Start />}
    </>
  );
}

function usageText({ prompt_tokens, completion_tokens, prompt_tokens_details: { cached_tokens, virtual_tokens } }: Usage): string {
  return `${plural(prompt_tokens, "text token")}, ${count(cached_tokens)} cached, ${count(virtual_tokens)} virtual; ${count(completion_tokens)} new.`;
}

function RunError({ error }: { error: Parameters<typeof ErrorNote>[0]["error"] }) {
  return (
    <div class="stack">
      <ErrorNote error={error} />
      {error.faults.length > 1 && (
        <ul class="faults card pad" aria-label="Faults">
          {error.faults.map((fault) => (
            <li key={fault.message}>{fault.message}</li>
          ))}
        </ul>
      )}
    </div>
  );
}

function Start() {
  return (
    <Empty title="Compare answers">
      <p>Write a text, add soft prompts, and run. All answers come from one request, in one batch of the engine.</p>
    </Empty>
  );
}

function Answers({ onRemove, base }: { onRemove: (member: string) => void; base: string }) {
  const { question, answers, labels: found, isRunning } = run.value!;
  if (question.mode === "classify")
    return (
      <div class="variants">
        {question.members.map((member, index) => (
          <LabelsCard key={member} member={member} base={base} result={found[index]!} />
        ))}
      </div>
    );
  return (
    <>
      <div class="variants">
        {answers.map((answer) => (
          <AnswerCard key={answer.member} answer={answer} base={base} isRunning={isRunning} onRemove={() => onRemove(answer.member)} />
        ))}
      </div>
      {question.mode !== "score" && <StepsCard answers={answers} base={base} />}
    </>
  );
}

/** Choosing what answers: names with a version or alias, and the base model. */
function Members({ members, onChange, base }: { members: string[]; onChange: (members: string[]) => void; base: string }) {
  const [typed, setTyped] = useState("");
  const { data } = useLoad("names", (signal) => (lacking("prompts:read") ? Promise.resolve(null) : call<PromptPage>("GET", `/v1/prompts${query({ limit: 200 })}`, undefined, signal)));
  const suggestions = (data?.data ?? []).flatMap((prompt) => [prompt.id, ...Object.keys(prompt.aliases).filter((alias) => alias !== "latest").map((alias) => `${prompt.id}@${alias}`)]);
  const full = members.length >= MAX_MEMBERS ? `At most ${MAX_MEMBERS} answers stand side by side.` : undefined;

  function add(member: string) {
    const name = member.trim();
    if (name && !full && !members.includes(name)) onChange([...members, name]);
    setTyped("");
  }

  return (
    <div class="members">
      <span class="row">
        {members.map((member) => (
          <span key={member} class="member">
            <Swatch name={nameOf(member, base)} />
            <b>{member}</b>
            <Button small kind="quiet" icon="close" label={`Take out ${member}`} onClick={() => onChange(members.filter((one) => one !== member))} />
          </span>
        ))}
      </span>
      <span class="row">
        <input
          aria-label="Add a soft prompt: NAME, NAME@VERSION or NAME@ALIAS"
          placeholder="Add a soft prompt"
          list="members"
          value={typed}
          autocomplete="off"
          onInput={(event) => (suggestions.includes(event.currentTarget.value) && event.inputType !== "insertText" ? add(event.currentTarget.value) : setTyped(event.currentTarget.value))}
          onKeyDown={(event) => {
            if (event.key !== "Enter" || event.metaKey || event.ctrlKey) return;
            event.preventDefault();
            add(typed);
          }}
        />
        <datalist id="members">
          {suggestions.map((name) => (
            <option key={name} value={name} />
          ))}
        </datalist>
        <Button icon="plus" blocked={full} onClick={() => add(typed)}>
          Add
        </Button>
        {base && !members.includes(base) && (
          <Button blocked={full} onClick={() => add(base)}>
            Add the base model
          </Button>
        )}
      </span>
    </div>
  );
}

function Copy({ question, fault }: { question: Question; fault: string | undefined }) {
  return (
    <span class="row" role="group" aria-label="Copy as">
      {LANGUAGES.map((language) => (
        <Button
          key={language}
          small
          icon="copy"
          blocked={fault ?? unsupported(language, question)}
          onClick={() => void navigator.clipboard.writeText(snippet(language, question)).then(() => report(`Copied as ${language}.`))}
        >
          {language}
        </Button>
      ))}
    </span>
  );
}
