#!/usr/bin/env bash
# The main job, from keys to conversation, with the model that this repository carries. Leaves demo-out/ behind.
set -euo pipefail
cd "$(dirname "$0")/.."
model=lab/models/stories-4m
out=demo-out
rm -rf "$out" && mkdir "$out"

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '\033[2m$ %s\033[0m\n' "$*"; "$@"; }

step "1. The vendor makes keys and seals a model: its embedding and bottom 2 of 8 blocks."
run semiopen keygen "$out/keys"
run semiopen seal "$model" --out "$out/bundle" --keys "$out/keys" --prefix 2

step "2. The customer checks who made the bundle, and looks inside."
run semiopen inspect "$out/bundle" --vendor-key "$out/keys/vendor.pub"

step "3. Without the enclave, the bundle is no model."
python - "$out/bundle" <<'PY' || true
import sys, semiopen
try:
    semiopen.load(sys.argv[1])
except semiopen.SemiopenError as error:
    print(f"semiopen.load: {error}")
PY

step "4. With it: a story, and a conversation, with the sealed blocks in a dev enclave."
run semiopen generate "$out/bundle" --keys "$out/keys" --prompt "Once upon a time" --max-new-tokens 60
printf '\033[2m$ semiopen chat %s\033[0m\n' "$out/bundle --keys $out/keys"
printf 'Tell me a story about a cat.\nTell me a story about a boat.\n' \
    | tee >(sed 's/^/> /' >&2) | semiopen chat "$out/bundle" --keys "$out/keys" --seed 3 --max-new-tokens 80

step "5. The proof: the original's tokens side by side, and no sealed weight in plain form on disk."
run semiopen compare "$out/bundle" "$model" --keys "$out/keys"

step "Talk to it yourself:  .venv/bin/semiopen chat $out/bundle --keys $out/keys"
