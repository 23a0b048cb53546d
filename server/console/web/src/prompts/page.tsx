import { route } from "../app/router";
import { PromptList } from "./list";
import { PromptPage } from "./prompt";

export function PromptsPage() {
  const name = route.value.parts[1];
  return name === undefined ? <PromptList /> : <PromptPage key={name} name={name} />;
}
