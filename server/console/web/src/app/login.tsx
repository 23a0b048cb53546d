import { useState } from "preact/hooks";
import { ApiError } from "../api/client";
import { Logo } from "../ui/icons";
import { Button, Field } from "../ui/parts";
import { logIn, loginReason } from "./session";

export function Login() {
  const [key, setKey] = useState("");
  const [fault, setFault] = useState<string>();
  const [isSending, setSending] = useState(false);

  async function submit(event: Event) {
    event.preventDefault();
    if (!key || isSending) return;
    setSending(true);
    try {
      await logIn(key.trim());
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setFault(error.message);
      setSending(false);
    }
  }

  return (
    <main id="main" class="login" tabIndex={-1}>
      <form class="card" onSubmit={submit}>
        <span class="brand">
          <Logo /> Prelude
        </span>
        <h1>Log in</h1>
        {loginReason.value && <p class="note warn">{loginReason.value}</p>}
        <Field label="API key" type="password" value={key} onInput={setKey} fault={fault} autoFocus hint="The key is sent once. The browser keeps a session, not the key." />
        <Button kind="primary" submit blocked={isSending ? "Logging in …" : undefined}>
          Log in
        </Button>
        <p class="dim3">
          <code>prelude key</code> makes a key; its line goes into the file of <code>--api-key-file</code>.
        </p>
      </form>
    </main>
  );
}
