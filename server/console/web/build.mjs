// Builds the console: node build.mjs OUT. Names hold a hash of the content; .gz and .br lie beside each text file.
import { build } from "esbuild";
import { mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { createHash } from "node:crypto";
import { basename, dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { brotliCompressSync, constants, gzipSync } from "node:zlib";

const here = dirname(fileURLToPath(import.meta.url));
const out = process.argv[2];
if (!out) throw new Error("usage: node build.mjs OUT");

await rm(out, { recursive: true, force: true });
await mkdir(join(out, "assets"), { recursive: true });
const result = await build({
  absWorkingDir: here,
  entryPoints: { console: "src/main.tsx", style: "src/styles/index.css" },
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  charset: "utf8",
  legalComments: "none", // LICENSES.txt holds the full texts
  entryNames: "assets/[name]-[hash]",
  outdir: out,
  metafile: true,
  logLevel: "warning",
});

const built = {};
for (const [file, { entryPoint }] of Object.entries(result.metafile.outputs))
  if (entryPoint) built[entryPoint] = `/console/assets/${basename(file)}`;

const icon = await readFile(join(here, "icon.svg"));
const iconName = `icon-${createHash("sha256").update(icon).digest("hex").slice(0, 8).toUpperCase()}.svg`;
await writeFile(join(out, "assets", iconName), icon);

const page = (await readFile(join(here, "index.html"), "utf8"))
  .replace("SCRIPT", built["src/main.tsx"])
  .replace("STYLE", built["src/styles/index.css"])
  .replace("ICON", `/console/assets/${iconName}`);
await writeFile(join(out, "index.html"), page);

const packages = new Set(
  Object.keys(result.metafile.inputs).flatMap((file) => /node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(file)?.[1] ?? []),
);
let licenses = "Third-party packages in the files beside this one.\n";
for (const name of [...packages].sort()) {
  const folder = join(here, "node_modules", name);
  const { version, license } = JSON.parse(await readFile(join(folder, "package.json"), "utf8"));
  const text = await readFile(join(folder, "LICENSE"), "utf8");
  licenses += `\n${name} ${version} (${license})\n\n${text.trim()}\n`;
}
await writeFile(join(out, "LICENSES.txt"), licenses);

for (const entry of await readdir(out, { recursive: true, withFileTypes: true })) {
  if (!entry.isFile()) continue;
  const file = join(entry.parentPath, entry.name);
  const data = await readFile(file);
  await writeFile(`${file}.gz`, gzipSync(data, { level: 9 }));
  await writeFile(`${file}.br`, brotliCompressSync(data, { params: { [constants.BROTLI_PARAM_QUALITY]: 11 } }));
  console.log(`${String(data.length).padStart(8)} ${relative(out, file)}`);
}
