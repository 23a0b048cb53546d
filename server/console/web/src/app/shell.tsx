// What stands around every page: navigation, the server's state, the search, messages.
import { useEffect } from "preact/hooks";
import { Icon, Logo } from "../ui/icons";
import { Button, Empty } from "../ui/parts";
import { Toasts } from "../ui/toast";
import { Banner } from "./banner";
import { Login } from "./login";
import { PAGES } from "./pages";
import { isPaletteOpen, Palette } from "./palette";
import { href, route } from "./router";
import { isServing, server } from "./server";
import { logOut, me } from "./session";
import { nextTheme, theme } from "./theme";

const THEMES = { auto: ["auto", "as the system asks"], light: ["sun", "light"], dark: ["moon", "dark"] } as const;

/** The name of the modifier key in shortcuts. */
export const MODIFIER = /Mac|iPhone|iPad/.test(navigator.userAgent) ? "⌘" : "Ctrl ";

function Navigation({ at }: { at: string | undefined }) {
  return (
    <nav aria-label="Pages">
      <ul>
        {PAGES.filter((page) => !page.isHidden).map((page) => (
          <li key={page.id}>
            <a href={href([page.id])} aria-current={page.id === at ? "page" : undefined}>
              <Icon name={page.icon} />
              {page.title}
            </a>
          </li>
        ))}
      </ul>
    </nav>
  );
}

function ServerCard() {
  const state = server.value;
  const [icon, words] = THEMES[theme.value];
  const who = me.value;
  return (
    <div class="srv">
      <b class="cut">
        <i class={`dot ${isServing() ? "ok" : "warn"}`} />
        {state?.model.id ?? "Prelude"}
        <span class="hidden">{isServing() ? " is serving" : " is not serving"}</span>
      </b>
      {state && (
        <span class="dim cut more">
          {[state.model.dtype, state.model.device, state.version].filter(Boolean).join(" · ")}
        </span>
      )}
      {who?.key && <span class="dim mono cut more">{[who.name ?? who.key, who.tenant].filter(Boolean).join(" · ")}</span>}
      <span class="row">
        <Button small kind="quiet" icon={icon} label={`Colours: ${words}. Change`} onClick={nextTheme} />
        {who?.key && <Button small kind="quiet" icon="out" label="Log out" onClick={() => void logOut()} />}
      </span>
    </div>
  );
}

export function Shell() {
  const at = route.value.parts[0] ?? PAGES[0]!.id;
  const page = PAGES.find((one) => one.id === at);
  const detail = route.value.parts[1];
  useEffect(() => {
    document.title = `${detail ? `${detail} · ` : ""}${page?.title ?? "Not found"} · Prelude`;
  }, [page, detail]);
  if (me.value === undefined) return <Connecting />;
  if (me.value === null) return <Login />;
  const Component = page?.component;
  return (
    <div class="app">
      <a class="skip" href="#main" onClick={(event) => { event.preventDefault(); document.getElementById("main")?.focus(); }}>
        Skip to content
      </a>
      <header class="side">
        <a class="brand" href={href([PAGES[0]!.id])}>
          <Logo /> Prelude
        </a>
        <button type="button" class="search" onClick={() => (isPaletteOpen.value = true)}>
          <Icon name="search" />
          <span>Find</span>
          <kbd>{MODIFIER}K</kbd>
        </button>
        <Navigation at={page?.id} />
        <ServerCard />
      </header>
      <main id="main" tabIndex={-1}>
        <Banner />
        {Component ? <Component /> : <NotFound />}
      </main>
      <Toasts />
      {isPaletteOpen.value && <Palette />}
    </div>
  );
}

function Connecting() {
  return (
    <main id="main" class="login" tabIndex={-1}>
      <h1 class="dim3">Connecting to the server …</h1>
    </main>
  );
}

function NotFound() {
  return (
    <>
      <h1>Not found</h1>
      <Empty title="There is no such page.">
        <p>
          <a href={href([PAGES[0]!.id])}>Go to the soft prompts</a>
        </p>
      </Empty>
    </>
  );
}
