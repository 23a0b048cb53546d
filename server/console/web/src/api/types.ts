// Names for the bodies of the API; their shapes are generated from the server's OpenAPI document.
import type { components } from "../../generated/api";

type Schemas = components["schemas"];

export type Rollout = Schemas["RolloutBody"];
export type Residency = Schemas["Residency"];
export type Diff = Schemas["DiffReply"];
export type KeyPage = Schemas["KeyList"];
export type Key = Schemas["KeyBody"];
export type Prompt = Schemas["PromptBody"];
export type PromptPage = Schemas["PromptList"];
export type Version = Schemas["VersionBody"];
export type VersionPage = Schemas["VersionList"];
export type Change = Schemas["HistoryBody"];
export type ChangePage = Schemas["HistoryList"];
export type Inspection = Schemas["InspectionBody"];
export type Deletion = Schemas["DeletedVersions"];
export type DryRun = Schemas["DryRun"];
export type Uploaded = Schemas["UploadedVersion"];
export type Me = Schemas["Me"];
export type ServerState = Schemas["ServerBody"];
export type Evaluation = Schemas["EvaluationBody"];
export type EvaluationPage = Schemas["EvaluationList"];
export type EvaluationComparison = Schemas["EvaluationComparison"];
export type EvaluationScores = Schemas["EvaluationScores"];
export type EvaluationRow = Schemas["RowBody"];
export type EvaluationRows = Schemas["RowList"];
export type Run = Schemas["RunBody"];
export type RunPage = Schemas["RunList"];
export type RunPoints = Schemas["PointList"];
