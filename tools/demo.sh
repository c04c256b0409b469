#!/bin/sh
# Train a small VAE on embedded digits, measure it and draw it: demo.sh BIN. Called by the Makefile.
set -eu
bin=$1 out=runs/demo
if [ -e "$out/config.json" ]; then
    echo "== $out is there: going on with it (remove it to start anew)"
    "$bin/vaelab" train conv-warmup --out "$out" --resume
else
    echo "== training conv-warmup on scikit-learn's handwritten digits, into $out"
    "$bin/vaelab" train conv-warmup --data digits --epochs 30 --batch-size 32 --out "$out"
fi
echo "== measuring it on the test images"
"$bin/vaelab" evaluate "$out" --preset quick
echo "== what to look at"
for picture in "$out"/*.png "$out"/*.gif; do echo "   $picture"; done
