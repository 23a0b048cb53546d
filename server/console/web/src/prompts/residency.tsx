// Where a version lies: on the device, in host memory, on the local disk.
import type { Residency } from "../api/types";
import { plural } from "../ui/format";
import { Chip } from "../ui/parts";

/** The tiers that have it, the nearest first. */
export function Tiers({ residency }: { residency: Residency }) {
  const { device, host, disk, known } = residency;
  return (
    <span class="row">
      {device && (
        <Chip kind={device.state === "loading" ? "warn" : "ok"} title="On the device">
          device{device.state === "loading" ? ", loading" : ""}
        </Chip>
      )}
      {host && <Chip title="In host memory">host</Chip>}
      {disk && <Chip title="On the local disk">disk</Chip>}
      {!device && !host && !disk && <span class="dim3">{known ? "object store" : "unknown"}</span>}
    </span>
  );
}

/** The same in words. */
export function tiersText({ device, host, disk, known }: Residency): string {
  const found: string[] = [];
  if (device) {
    const state = device.state === "loading" ? "loading" : device.users === 0 ? "idle" : `used by ${plural(device.users, "sequence")}`;
    found.push(`on the device (${device.blocks > 0 ? `${plural(device.blocks, "block")}, ` : ""}${state})`);
  }
  if (host) found.push("in host memory");
  if (disk) found.push("on the local disk");
  if (!known) found.push("the engine does not say what it has in memory");
  return found.join(", ") || "not on this server";
}
