#!/usr/bin/env bash
# What the GitHub Action runs.
#
# ci-check.sh           checks the base, then this commit against it. Exits as `meshwright check` does: 0 fits, 1 does not fit or
#                       grew too much, 2 could not be evaluated. It runs the model's own code, so it is given no token.
#   MESHWRIGHT_CONFIG   the configuration, relative to this folder (empty: the one that is here)
#   MESHWRIGHT_BASE     the commit or branch to compare with (empty: GITHUB_BASE_REF; neither: no comparison)
#   MESHWRIGHT_OUT      where report.json, comment.md, report.sarif, junit.xml and base.json go (empty: a new folder)
#
# ci-check.sh comment   posts MESHWRIGHT_OUT/report.json under pull request PULL_REQUEST, or updates the comment that is there
#   MESHWRIGHT_TAG      tells the comments of several configurations apart
set -euo pipefail

say() { echo "meshwright: $*" >&2; }
notice() { echo "::notice title=meshwright check::$*"; }

if [ "${1:-check}" = comment ]; then
  # a token that may not write, like that of a fork, does not fail the job
  meshwright comment --path "$MESHWRIGHT_OUT/report.json" --pull-request "$PULL_REQUEST" --tag "${MESHWRIGHT_TAG:-}" ||
    notice "the comment could not be posted; the summary of this run has it"
  exit 0
fi

args=()
[ -z "${MESHWRIGHT_CONFIG:-}" ] || args=(--config "$MESHWRIGHT_CONFIG")
out=${MESHWRIGHT_OUT:-$(mktemp -d)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
[ -z "${GITHUB_OUTPUT:-}" ] || echo "folder=$out" >>"$GITHUB_OUTPUT"

# Which commit is the base?
base=${MESHWRIGHT_BASE:-}
if [ -z "$base" ] && [ -n "${GITHUB_BASE_REF:-}" ]; then
  base=refs/remotes/origin/$GITHUB_BASE_REF
  depth=() # a clone with its history keeps it
  [ "$(git rev-parse --is-shallow-repository)" = false ] || depth=(--depth=1)
  git fetch --quiet --no-tags ${depth[@]+"${depth[@]}"} origin "+refs/heads/$GITHUB_BASE_REF:$base" || say "the base branch could not be fetched"
fi
commit=
for name in ${base:+"$base" "origin/$base"}; do
  commit=$(git rev-parse --quiet --verify --end-of-options "$name^{commit}") && break
done
if [ -n "$base" ] && [ -z "$commit" ]; then
  notice "the base is not a commit of this clone, so nothing is compared"
fi

# Its checks, in a work tree of its own, with the software of this commit.
compare=()
if [ -n "$commit" ]; then
  within=$(git rev-parse --show-prefix)
  temporary=$(mktemp -d)
  trap 'git worktree remove --force "$temporary/base" 2>/dev/null || true; rm -rf "$temporary"' EXIT
  git worktree add --quiet --detach "$temporary/base" "$commit"
  say "checking the base, ${commit:0:10}"
  if [ -d "$temporary/base/$within" ]; then
    (
      cd "$temporary/base/$within"
      env -u GITHUB_WORKSPACE meshwright check ${args[@]+"${args[@]}"} --exit-zero --save "$out/base.json" >/dev/null
    ) || say "the base has checks that could not be evaluated"
  fi
  if [ -f "$out/base.json" ]; then
    compare=(--compare-to "$out/base.json")
  else
    notice "the base has no checks, so nothing is compared"
  fi
fi

# This commit's checks, against it.
code=0
meshwright check ${args[@]+"${args[@]}"} ${compare[@]+"${compare[@]}"} --format github \
  -o "json:$out/report.json" -o "markdown:$out/comment.md" -o "sarif:$out/report.sarif" -o "junit:$out/junit.xml" || code=$?
[ -z "${GITHUB_OUTPUT:-}" ] || echo "exit-code=$code" >>"$GITHUB_OUTPUT"
exit "$code"
