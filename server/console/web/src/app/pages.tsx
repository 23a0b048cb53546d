// The pages, in the order of the navigation.
import type { ComponentType } from "preact";
import { ActivityPage } from "../activity/page";
import { EvaluationsPage } from "../evaluations/page";
import { KeysPage } from "../keys/page";
import { LivePage } from "../live/page";
import { PlaygroundPage } from "../playground/page";
import { PromptsPage } from "../prompts/page";
import { UploadPage } from "../prompts/upload";
import { ReferencePage } from "../reference/page";
import { TrainingPage } from "../training/page";
import type { IconName } from "../ui/icons";

export interface Page {
  id: string;
  title: string;
  icon: IconName;
  component: ComponentType;
  /** Reached from another page, not from the navigation. */
  isHidden?: boolean;
}

export const PAGES: Page[] = [
  { id: "prompts", title: "Prompts", icon: "prompts", component: PromptsPage },
  { id: "playground", title: "Playground", icon: "playground", component: PlaygroundPage },
  { id: "live", title: "Live", icon: "live", component: LivePage },
  { id: "evaluations", title: "Evaluations", icon: "evaluations", component: EvaluationsPage },
  { id: "training", title: "Training", icon: "training", component: TrainingPage },
  { id: "upload", title: "Upload", icon: "upload", component: UploadPage, isHidden: true },
  { id: "activity", title: "Activity", icon: "activity", component: ActivityPage },
  { id: "keys", title: "Keys", icon: "keys", component: KeysPage },
  { id: "api", title: "API", icon: "api", component: ReferencePage },
];
