import { render } from "preact";
import { watchEvents } from "./app/events";
import { openOnShortcut } from "./app/palette";
import { watchServer } from "./app/server";
import { findMe } from "./app/session";
import { Shell } from "./app/shell";

export { hueOf } from "./ui/colours";

void findMe();
watchServer();
watchEvents();
openOnShortcut();
render(<Shell />, document.getElementById("app")!);
