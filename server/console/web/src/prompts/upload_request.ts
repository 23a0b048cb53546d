// Sending an upload, with its progress.
import { type ApiError, HEADERS, isReachable, refusedSessions, toError } from "../api/client";
import type { DryRun, Uploaded } from "../api/types";

export const FILES = ["adapter_config.json", "adapter_model.safetensors"] as const;

export interface Upload {
  files: File[];
  /** The text fields; an empty one is not sent. */
  fields: Record<string, string>;
  onProgress: (share: number) => void;
}

/** Upload files. `isNew` is false if the same files are there already. Rejects with ApiError. */
export async function send(upload: Upload): Promise<{ version: Uploaded; isNew: boolean }> {
  const { status, body } = await post(upload);
  return { version: body as Uploaded, isNew: status === 201 };
}

/** What an upload would store. Rejects with the ApiError of a real one. */
export async function tryOut(upload: Upload): Promise<DryRun> {
  return (await post({ ...upload, fields: { ...upload.fields, dry_run: "true" } })).body as DryRun;
}

function post({ files, fields, onProgress }: Upload): Promise<{ status: number; body: unknown }> {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) if (value) form.append(name, value);
  for (const file of files) form.append("files", file, file.name);
  return new Promise((resolve, reject: (error: ApiError) => void) => {
    const request = new XMLHttpRequest(); // fetch does not report the progress of an upload
    request.open("POST", "/v1/prompts");
    for (const [name, value] of Object.entries(HEADERS)) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onerror = () => {
      isReachable.value = false;
      reject(toError(0, '{"error": {"message": "The server does not answer.", "code": "unreachable"}}'));
    };
    request.onload = () => {
      if (request.status < 300) return resolve({ status: request.status, body: JSON.parse(request.responseText) as unknown });
      if (request.status === 401) refusedSessions.value += 1;
      reject(toError(request.status, request.responseText));
    };
    request.send(form);
  });
}

/** The files of a drop: those dropped, and those in dropped folders. */
export async function dropped(items: DataTransferItemList): Promise<File[]> {
  const entries = [...items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
  return (await Promise.all(entries.map(filesOf))).flat();
}

async function filesOf(entry: FileSystemEntry): Promise<File[]> {
  if (entry.isFile) return [await new Promise<File>((resolve, reject) => (entry as FileSystemFileEntry).file(resolve, reject))];
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  const inside = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
  return (await Promise.all(inside.filter((one) => one.isFile).map(filesOf))).flat();
}
