"""Copies of weights and bytes read, in a text as compilers write it and in small programs compiled for the CPU."""

import jax
import jax.numpy as jnp
import pytest

from dream_jax.plan import traffic

# What the compilers of GPUs and TPUs write, cut down to what counts. The weights are two layers of one product.
PROGRAM = """
HloModule sampler, is_scheduled=true

%joins (left: bf16[1024], right: bf16[1024], y: f32[32]) -> f32[32] {
  %left = bf16[1024]{0} parameter(0)
  %right = bf16[1024]{0} parameter(1)
  %joined = bf16[2048]{0} concatenate(%left, %right), dimensions={0}
  %y.1 = f32[32]{0} parameter(2)
  ROOT %dot = f32[32]{0} dot(%joined, %y.1)
}

%takes_a_slice (stack: bf16[2,1024], index: s32[]) -> bf16[1,1024] {
  %stack = bf16[2,1024]{1,0} parameter(0)
  %index = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,1024]{1,0} dynamic-slice(%stack, %index, %zero), dynamic_slice_sizes={1,1024}
}

%slices_inside (stack: bf16[2,1024], index: s32[]) -> bf16[1024] {
  %stack.1 = bf16[2,1024]{1,0} parameter(0)
  %cast = bf16[2048]{0} bitcast(%stack.1)
  %index.1 = s32[] parameter(1)
  ROOT %slice.1 = bf16[1024]{0} dynamic-slice(%cast, %index.1), dynamic_slice_sizes={1024}
}, execution_thread="main"

%slices_and_multiplies (stack: bf16[2,1024], x: f32[32], index: s32[]) -> f32[32] {
  %stack.4 = bf16[2,1024]{1,0} parameter(0)
  %x = f32[32]{0} parameter(1)
  %index.2 = s32[] parameter(2)
  %inside = bf16[1024]{0} fusion(%stack.4, %index.2), kind=kLoop, calls=%slices_inside
  ROOT %dot.1 = f32[32]{0} dot(%inside, %x)
}

%condition (carried: (s32[], f32[32], bf16[2,1024], bf16[1024])) -> pred[] {
  %carried = (s32[], f32[32]{0}, bf16[2,1024]{1,0}, bf16[1024]{0}) parameter(0)
  %counter = s32[] get-tuple-element(%carried), index=0
  %limit = s32[] constant(2)
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

%body (carried: (s32[], f32[32], bf16[2,1024], bf16[1024])) -> (s32[], f32[32], bf16[2,1024], bf16[1024]) {
  %carried.1 = (s32[], f32[32]{0}, bf16[2,1024]{1,0}, bf16[1024]{0}) parameter(0)
  %counter.1 = s32[] get-tuple-element(%carried.1), index=0
  %x.1 = f32[32]{0} get-tuple-element(%carried.1), index=1
  %stack.2 = bf16[2,1024]{1,0} get-tuple-element(%carried.1), index=2
  %mixed = bf16[1024]{0} get-tuple-element(%carried.1), index=3
  %taken = bf16[1,1024]{1,0} fusion(%stack.2, %counter.1), kind=kLoop, calls=%takes_a_slice
  %copy_of_data = bf16[1024]{0} copy(%mixed)
  %y = f32[32]{0} fusion(%stack.2, %x.1, %counter.1), kind=kOutput, calls=%slices_and_multiplies
  %activation = bf16[1024]{0} custom-call(%taken, %y), custom_call_target="gemm"
  %one = s32[] constant(1)
  %next = s32[] add(%counter.1, %one)
  ROOT %out = (s32[], f32[32]{0}, bf16[2,1024]{1,0}, bf16[1024]{0}) tuple(%next, %y, %stack.2, %activation)
}

%yes (weights: bf16[1024]) -> f32[32] {
  %weights = bf16[1024]{0} parameter(0)
  %widened = f32[1024]{0} convert(%weights)
  ROOT %first = f32[32]{0} slice(%widened), slice={[0:32]}
}

%no (x: f32[32]) -> f32[32] {
  ROOT %x.2 = f32[32]{0} parameter(0)
}

ENTRY %main (stack: bf16[2,1024], head: bf16[1024], x: f32[32], p: pred[]) -> f32[32] {
  %stack.3 = bf16[2,1024]{1,0} parameter(0), metadata={op_name="model.layers.kernel.value"}
  %head = bf16[1024]{0} parameter(1), metadata={op_name="model.head.kernel.value"}
  %x.3 = f32[32]{0} parameter(2), metadata={op_name="x"}
  %p = pred[] parameter(3), metadata={op_name="p"}
  %other_order = bf16[2,1024]{0,1} copy(%stack.3)
  %ahead = (bf16[1024]{0:S(1)}, bf16[1024]{0}, u32[]) copy-start(%head)
  %is_ahead = bf16[1024]{0:S(1)} copy-done(%ahead)
  %again = (bf16[1024]{0}, bf16[1024]{0}, u32[]) copy-start(%head)
  %is_again = bf16[1024]{0} copy-done(%again)
  %small = bf16[8]{0} slice(%head), slice={[0:8]}
  %few = ((bf16[1024]{0}), bf16[8]{0:S(1)}, s32[]) slice-start(%head), slice={[0:8]}
  %few_are_here = bf16[8]{0:S(1)} slice-done(%few)
  %gathered = bf16[4,1024]{1,0} all-gather(%stack.3), replica_groups=[1,2]<=[2], dimensions={0}
  %product = f32[32]{0} fusion(%head, %is_ahead, %x.3), kind=kCustom, calls=%joins
  %zero.1 = s32[] constant(0)
  %begin = (s32[], f32[32]{0}, bf16[2,1024]{1,0}, bf16[1024]{0}) tuple(%zero.1, %product, %stack.3, %head)
  %loop = (s32[], f32[32]{0}, bf16[2,1024]{1,0}, bf16[1024]{0}) while(%begin), condition=%condition, body=%body
  %z = f32[32]{0} get-tuple-element(%loop), index=1
  ROOT %either = f32[32]{0} conditional(%p, %head, %z), true_computation=%yes, false_computation=%no
}
"""


def copies(least, text=PROGRAM, weights="model"):
    """Name -> (bytes, times) of each copy."""
    return {one.name: (one.nbytes, one.times) for one in traffic.weight_copies(text, least=least, weights=weights)}


def test_what_depends_on_weights_alone_is_found_wherever_it_is_written():
    assert copies(2048) == {
        "other_order": (4096, 1),
        "is_again": (2048, 1),  # but not what goes to the memory of a TPU's compute units
        "joined": (4096, 1),  # in a fusion
        "taken": (2048, 2),  # in every round of the loop; the slice inside a product is none
        "widened": (4096, 1),  # in one branch
    }


def test_size_and_names_decide():
    assert copies(2049).keys() == {"other_order", "joined", "widened"}
    assert copies(2048, weights=r"model\.head").keys() == {"is_again", "joined", "widened"}
    with pytest.raises(ValueError, match="begins with 'params'"):
        copies(1, weights="params")


def test_copies_are_shown_with_their_shapes():
    found = traffic.weight_copies(PROGRAM, least=2048, weights="model")
    assert "2 x fusion taken: bf16[1,1024]{1,0}" in traffic.named(found).splitlines()


def test_bytes_that_a_text_reads():
    layers = 2 * (2048 + 2048 + 2048 + 128 + 2048 + 128)
    # The loop: a slice, a copy, a slice and x, the two operands of the product; counters in between.
    entry = 4096 + 2048 + 2048 + 16 + 16 + 4096 + 2048 + 128
    branch = 2048 + 128
    assert traffic.bytes_read(PROGRAM) == pytest.approx(entry + layers + branch, abs=100)


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_compiled_scan_reads_each_layer_once():
    def function(model, x):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, model)[0]

    text = compiled(function, (6, 64, 64), (8, 64))
    weights = 6 * 64 * 64 * 4
    # A CPU takes each layer out of the stack, so it reads the weights twice.
    assert 1.9 * weights < traffic.bytes_read(text) < 2.5 * weights
    (copy,) = traffic.weight_copies(text, least=64 * 64 * 4, weights="model")
    assert (copy.nbytes, copy.times) == (64 * 64 * 4, 6)


def test_compiled_product_reads_its_operands():
    text = compiled(lambda model, x: x @ model, (512, 256), (8, 512))
    assert traffic.bytes_read(text) == pytest.approx((512 * 256 + 8 * 512) * 4, rel=0.1)
    assert traffic.weight_copies(text, least=512 * 256 * 4, weights="model") == ()
