// The small parts that every page is made of.
import type { ComponentChildren, JSX } from "preact";
import { useId } from "preact/hooks";
import type { ApiError } from "../api/client";
import { lacking, type Scope } from "../app/session";
import { colourOf } from "./colours";
import { Icon, type IconName } from "./icons";

export function Swatch({ name }: { name: string | null | undefined }) {
  const { class: kind, style } = colourOf(name);
  return <i class={`sw ${kind}`} style={style} aria-hidden="true" />;
}

interface ButtonProps {
  children?: ComponentChildren;
  onClick?: (event: MouseEvent) => void;
  icon?: IconName;
  kind?: "primary" | "danger" | "quiet";
  small?: boolean;
  /** The name for a screen reader, if the button shows an icon alone. */
  label?: string;
  /** The scope that the action needs; without it the button is there, and says so. */
  needs?: Scope;
  /** Why the button cannot be used now. */
  blocked?: string | undefined;
  submit?: boolean;
  pressed?: boolean;
}

/** A button. One that cannot be used stays reachable by keyboard and says why. */
export function Button({ children, onClick, icon, kind, small, label, needs, blocked, submit, pressed }: ButtonProps) {
  const id = useId();
  const missing = needs && lacking(needs);
  const reason = missing ? `This key lacks the scope ${missing}.` : blocked;
  return (
    <span class="hint">
      <button
        type={submit && !reason ? "submit" : "button"}
        class={`btn ${kind ?? ""} ${small ? "sm" : ""} ${children ? "" : "only"}`}
        aria-label={label}
        aria-pressed={pressed}
        aria-disabled={reason ? true : undefined}
        aria-describedby={reason ? id : undefined}
        title={reason || (children ? undefined : label)}
        onClick={(event) => (reason ? event.preventDefault() : onClick?.(event))}
      >
        {icon && <Icon name={icon} />}
        {children}
      </button>
      {reason && (
        <span id={id} role="tooltip" class="reason">
          {reason}
        </span>
      )}
    </span>
  );
}

interface CardProps {
  title: ComponentChildren;
  children?: ComponentChildren;
  side?: ComponentChildren;
  class?: string;
  style?: Record<string, string>;
}

export function Card({ title, side, children, class: more = "", style }: CardProps) {
  const id = useId();
  return (
    <section class={`card ${more}`} aria-labelledby={id} style={style}>
      <header>
        <h2 id={id}>{title}</h2>
        <span class="grow" />
        {side}
      </header>
      {children}
    </section>
  );
}

export function Chip({ children, kind = "", title }: { children: ComponentChildren; kind?: string; title?: string }) {
  return (
    <span class={`chip ${kind}`} title={title}>
      {children}
    </span>
  );
}

/** A choice of one among a few. */
export function Segments<T extends string>(props: { label: string; options: [T, string][]; value: T; onChange: (value: T) => void }) {
  return (
    <div class="seg" role="group" aria-label={props.label}>
      {props.options.map(([value, text]) => (
        <button key={value} type="button" aria-pressed={value === props.value} onClick={() => props.onChange(value)}>
          {text}
        </button>
      ))}
    </div>
  );
}

interface FieldProps {
  label: string;
  value: string;
  onInput: (value: string) => void;
  hint?: ComponentChildren;
  fault?: string | undefined;
  placeholder?: string;
  type?: "text" | "password";
  inputMode?: "numeric" | "decimal";
  class?: string;
  list?: string;
  autoFocus?: boolean;
  rows?: number;
}

/** A labelled text field with its fault beneath. */
export function Field(props: FieldProps) {
  const id = useId();
  const describedBy = [props.hint && `${id}-hint`, props.fault && `${id}-fault`].filter(Boolean).join(" ") || undefined;
  const shared = {
    id,
    value: props.value,
    placeholder: props.placeholder,
    "aria-invalid": props.fault ? true : undefined,
    "aria-describedby": describedBy,
    autocomplete: "off",
    spellcheck: false,
    onInput: (event: { currentTarget: { value: string } }) => props.onInput(event.currentTarget.value),
  };
  // The types of Preact know no input whose type is decided here.
  const input = { ...shared, type: props.type ?? "text", inputMode: props.inputMode, list: props.list, autofocus: props.autoFocus };
  return (
    <div class={`field ${props.class ?? ""}`}>
      <label for={id}>{props.label}</label>
      {props.rows ? <textarea {...shared} rows={props.rows} /> : <input {...(input as JSX.IntrinsicElements["input"])} />}
      {props.hint && <small id={`${id}-hint`}>{props.hint}</small>}
      {props.fault && (
        <small id={`${id}-fault`} class="bad">
          {props.fault}
        </small>
      )}
    </div>
  );
}

export function Empty({ title, children }: { title: string; children?: ComponentChildren }) {
  return (
    <div class="empty">
      <p class="strong">{title}</p>
      {children}
    </div>
  );
}

export function ErrorNote({ error, retry }: { error: ApiError; retry?: () => void }) {
  return (
    <div class="note bad" role="alert">
      <span>
        <Chip kind="bad">{error.code}</Chip> {error.message}
      </span>
      {retry && (
        <Button small onClick={retry}>
          Try again
        </Button>
      )}
    </div>
  );
}

export function Loading() {
  return (
    <p class="pad dim3" role="status">
      Loading …
    </p>
  );
}

/** A small line chart; the label says in words what it shows. */
export function Spark({ values, label, width = 160, height = 30 }: { values: (number | null)[]; label: string; width?: number; height?: number }) {
  const known = values.map((value) => value ?? 0);
  const most = Math.max(...known, 1e-9);
  const points = known.map((value, index) => `${((index / Math.max(known.length - 1, 1)) * width).toFixed(1)},${(height - 2 - (value / most) * (height - 5)).toFixed(1)}`);
  return (
    <svg class="spark" viewBox={`0 0 ${width} ${height}`} preserveAspectRatio="none" role="img" aria-label={label}>
      {points.length > 1 && <polygon points={`0,${height} ${points.join(" ")} ${width},${height}`} />}
      {points.length > 1 && <polyline points={points.join(" ")} />}
    </svg>
  );
}

/** A table that scrolls sideways within itself, by keyboard too. */
export function Scroll({ label, children }: { label: string; children: ComponentChildren }) {
  return (
    <div class="scroll" role="region" aria-label={label} tabIndex={0}>
      {children}
    </div>
  );
}
