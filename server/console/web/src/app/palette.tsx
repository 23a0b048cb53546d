// Find a soft prompt or a page by a few letters: Ctrl+K or ⌘K.
import { signal } from "@preact/signals";
import { useEffect, useId, useState } from "preact/hooks";
import { ApiError, call, query } from "../api/client";
import type { PromptPage } from "../api/types";
import { Dialog } from "../ui/dialog";
import { Icon } from "../ui/icons";
import { Swatch } from "../ui/parts";
import { PAGES } from "./pages";
import { go, href } from "./router";
import { lacking } from "./session";

export const isPaletteOpen = signal(false);

interface Hit {
  key: string;
  text: string;
  hint: string;
  to: string;
  prompt?: string;
}

const MAX_PROMPTS = 8;
const NUM_SEARCHED = 100;
const WAIT_MS = 120;

function pagesFor(words: string): Hit[] {
  return PAGES.filter((page) => page.title.toLowerCase().includes(words)).map((page) => ({
    key: `page/${page.id}`,
    text: page.title,
    hint: "page",
    to: href([page.id]),
  }));
}

export function Palette() {
  const id = useId();
  const [text, setText] = useState("");
  const [prompts, setPrompts] = useState<Hit[]>([]);
  const [chosen, setChosen] = useState(0);
  const words = text.trim().toLowerCase();
  // Until the answer for new letters is there, what does not fit them any more is left out.
  const hits = [...prompts.filter((hit) => hit.text.includes(words) || hit.hint.toLowerCase().includes(words)), ...pagesFor(words)];
  const at = Math.min(chosen, hits.length - 1);

  useEffect(() => {
    if (lacking("prompts:read")) return;
    const abort = new AbortController();
    const timer = setTimeout(async () => {
      try {
        const { data } = await call<PromptPage>("GET", `/v1/prompts${query({ q: words, limit: NUM_SEARCHED })}`, undefined, abort.signal);
        const isNamed = (one: { id: string }) => Number(one.id.includes(words));
        const found = data.sort((one, other) => isNamed(other) - isNamed(one)).slice(0, MAX_PROMPTS);
        setPrompts(found.map((one) => ({ key: `prompt/${one.id}`, text: one.id, hint: one.latest.description || "soft prompt", to: href(["prompts", one.id]), prompt: one.id })));
        setChosen(0);
      } catch (error) {
        if (!abort.signal.aborted && !(error instanceof ApiError)) throw error;
      }
    }, WAIT_MS);
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [words]);

  function open(hit: Hit | undefined) {
    if (!hit) return;
    isPaletteOpen.value = false;
    go(hit.to);
  }

  function onKeyDown(event: KeyboardEvent) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      setChosen((at + step + hits.length) % Math.max(hits.length, 1));
    } else if (event.key === "Enter") {
      event.preventDefault();
      open(hits[at]);
    }
  }

  return (
    <Dialog title="Find" onClose={() => (isPaletteOpen.value = false)}>
      <div class="pad palette">
        <input
          role="combobox"
          aria-label="Find a soft prompt or a page"
          aria-expanded="true"
          aria-controls={id}
          aria-activedescendant={hits[at] && `${id}-${at}`}
          aria-autocomplete="list"
          autocomplete="off"
          spellcheck={false}
          autofocus
          value={text}
          onInput={(event) => setText(event.currentTarget.value)}
          onKeyDown={onKeyDown}
        />
        <ul id={id} role="listbox" aria-label="Found">
          {hits.map((hit, index) => (
            <li key={hit.key} id={`${id}-${index}`} role="option" aria-selected={index === at} onClick={() => open(hit)}>
              {hit.prompt ? <Swatch name={hit.prompt} /> : <Icon name="back" />}
              <b>{hit.text}</b>
              <span class="dim3 cut">{hit.hint}</span>
            </li>
          ))}
        </ul>
        {hits.length === 0 && <p class="dim3">Nothing has these letters in its name.</p>}
      </div>
    </Dialog>
  );
}

export function openOnShortcut(): void {
  addEventListener("keydown", (event) => {
    if (event.key.toLowerCase() !== "k" || !(event.metaKey || event.ctrlKey) || event.shiftKey || event.altKey) return;
    event.preventDefault();
    isPaletteOpen.value = !isPaletteOpen.value;
  });
}
