#!/usr/bin/env bash
# The walkthrough of README.md: a repository with two checks, a pull request that breaks one, and what CI says of it.
# Needs meshwright and git. `run.sh --readme` writes what was printed into README.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
script=$here/../../scripts/ci-check.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset GITHUB_BASE_REF GITHUB_STEP_SUMMARY GITHUB_OUTPUT GITHUB_WORKSPACE

commit() { git add . && git -c user.name=author -c user.email=author@example.com commit --quiet -m "$1"; }
show() { # what is printed after "$", then the command
  printf '$ %s\n' "$1" && shift
  "$@" 2>/dev/null || echo "(exit code $?)"
  echo
}

story() {
  mkdir "$work/repository" && cd "$work/repository"
  cp "$here/model.py" "$here/pyproject.toml" .
  git init --quiet --initial-branch main
  commit "A model and its checks"
  show "meshwright check" meshwright check

  git switch --quiet -c longer-context
  git apply "$here/longer-context.patch"
  commit "Longer context, wider layers"
  export MESHWRIGHT_BASE=main MESHWRIGHT_OUT=$work/out
  show "bash scripts/ci-check.sh" bash "$script"
  show "cat comment.md" cat "$work/out/comment.md"

  cp "$work/out/base.json" .
  show "meshwright check --compare-to base.json" meshwright check --compare-to base.json
  show "meshwright diff --compare-to base.json" meshwright diff --compare-to base.json
}

story | tee "$work/transcript"
[ "${1:-}" = --readme ] || exit 0
python3 - "$work/transcript" "$here/README.md" <<'PY'
import re
import sys
from pathlib import Path

transcript, readme = (Path(p) for p in sys.argv[1:])
printed = {}
for part in re.split(r"^\$ ", transcript.read_text(), flags=re.MULTILINE)[1:]:
    command, _, output = part.partition("\n")
    printed[command] = output.strip("\n")
text = readme.read_text()
for command, output in printed.items():
    block = re.compile(r"(^(~~~|```)\w*\n\$ " + re.escape(command) + r"\n).*?(^\2$)", re.MULTILINE | re.DOTALL)
    text, found = block.subn(lambda m: m[1] + output + "\n" + m[3], text)
    if not found:
        sys.exit(f"README.md has no block that starts with: $ {command}")
readme.write_text(text)
PY
