#!/usr/bin/env bash
# Inside torch.func.vmap a tensor that will be differentiated says requires_grad=False.
#
# Library: torch 2.13.0.
# Surprise: with vmap around a module, and the backward pass outside of it, every tensor inside reads requires_grad as
#   False, inputs that have a gradient afterwards among them; so it is for vmap of torch.func.grad in the first step.
#   A custom autograd.Function learns the truth from ctx.needs_input_grad alone; code that asks x.requires_grad (to choose
#   a kernel, to keep something for the backward pass, to checkpoint) silently takes the way without derivatives.
# Expected: what requires_grad says outside of vmap.
# Where upweight meets it: gradients of examples are vmap over a model's own code. Second derivatives of attention are
#   written out as a Function (model/attention_twice.py), which decides by needs_input_grad.
#
# Seen: outside True and (True,); inside vmap False and (True,), and the gradient is there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6"
cat > "$folder/asks.py" <<'PYTHON'
import torch

told = []


class Doubled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        told.append((inputs[0].requires_grad, ctx.needs_input_grad))

    @staticmethod
    def backward(ctx, g):
        return 2 * g


for apply in (Doubled.apply, torch.func.vmap(Doubled.apply)):
    x = torch.ones(2, 3, requires_grad=True)
    apply(x).sum().backward()
    assert x.grad.eq(2).all()
print(told)
PYTHON
found=$("$folder/venv/bin/python" "$folder/asks.py")
echo "requires_grad and needs_input_grad outside of vmap and inside: $found"
[ "$found" = "[(True, (True,)), (False, (True,))]" ] || { echo "no longer as stated"; exit 1; }
