// The dialog that promotes a version, from a page that knows its name and number alone.
import { returns } from "../app/server";
import { Dialog } from "../ui/dialog";
import { useLoad } from "../ui/load";
import { ErrorNote, Loading } from "../ui/parts";
import { PromoteDialog } from "./promote";
import { readDetails } from "./prompt";

export function PromoteFrom({ name, version, onClose }: { name: string; version: number; onClose: () => void }) {
  const { data, error, reload } = useLoad(`${name} ${returns.value}`, (signal) => readDetails(name, signal));
  if (data) return <PromoteDialog details={data} version={version} onClose={onClose} onDone={reload} />;
  return (
    <Dialog title={`Promote version ${version} of ${name}`} onClose={onClose}>
      <div class="pad">{error ? <ErrorNote error={error} retry={reload} /> : <Loading />}</div>
    </Dialog>
  );
}
