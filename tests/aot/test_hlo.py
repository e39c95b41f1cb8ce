"""The order check on small scheduled modules, right ones and ones in which XLA would have undone the order."""

import pytest

from lamina_jax.aot.hlo import Hlo, Widths, early_violations, order_violations

WIDTHS = Widths(q=(8, 16), kv=(8, 4))
CALL = 'custom-call({}), custom_call_target="lamina_cuda_{}", backend_config={{channels = dense<1> : tensor<1xi64>{}}}'


def call(name: str, kind: str, operands: str, tag: int | None = None) -> str:
    return f"  %{name} = s32[3]{{0}} " + CALL.format(operands, kind, f", tag = {tag} : i32" if tag else "")


STAMP = "  %stamp = s32[3]{0} parameter(0)"
X = "  %x = f32[2,8]{1,0} parameter(1)"
WQ = "  %wq = f32[8,16]{1,0} parameter(2)"
WK = "  %wk = f32[8,4]{1,0} parameter(3)"
COS = "  %cos = f32[2,4]{1,0} fusion(%x), kind=kLoop, calls=%fused_cos"
EARLY = call("early", "fence", "%stamp, %cos")
RECV = call("recv", "recv", "%early", 3)
Q = '  %q = f32[2,16]{1,0} custom-call(%x, %wq, %recv), custom_call_target="__cublas$lt$matmul"'
SEND_Q = call("send_q", "send", "%recv, %q", 1)
FENCE = call("fence", "fence", "%send_q, %x")
K = '  %k = f32[2,4]{1,0} custom-call(%fence, %wk), custom_call_target="__cublas$lt$matmul"'
SEND_KV = call("send_kv", "send", "%fence, %k", 2)
END = "  ROOT %out = (s32[3]{0}) tuple(%send_kv)"
PARAMETERS = [STAMP, X, WQ, WK]
GOOD = [*PARAMETERS, COS, EARLY, RECV, Q, SEND_Q, FENCE, K, SEND_KV, END]


def hlo(lines: list[str]) -> Hlo:
    fused = "%fused_cos (p: f32[2,8]) -> f32[2,4] {\n  %p = f32[2,8]{1,0} parameter(0)\n  ROOT %c = cosine(%p)\n}\n"
    return Hlo.parse(
        "HloModule m, is_scheduled=true\n\n" + fused + "\nENTRY %main () -> () {\n" + "\n".join(lines) + "\n}\n"
    )


def replaced(line: str, by: str) -> list[str]:
    assert line in GOOD
    return [by if other == line else other for other in GOOD]


def test_the_wanted_order_has_no_violations():
    assert order_violations(hlo(GOOD), WIDTHS, receives=True) == []
    assert early_violations(hlo(GOOD), [r" cosine\("]) == []


def test_k_that_does_not_wait_for_q_is_found_though_it_is_scheduled_late():
    free = replaced(K, K.replace("%fence", "%x"))
    assert order_violations(hlo(free), WIDTHS, receives=True) == [
        "send of q and product of k, v: k does not depend on send_q"
    ]


def test_k_that_is_scheduled_before_q_is_sent_is_found():
    moved = [line for line in GOOD if line != K]
    moved.insert(moved.index(SEND_Q), K.replace("%fence", "%x"))
    found = order_violations(hlo(moved), WIDTHS, receives=True)
    assert "send of q and product of k, v: k is scheduled before send_q" in found


def test_a_joined_product_of_q_and_k_is_found():
    """XLA joins products of one operand; then q waits for k and v."""
    joined = '  %q = f32[2,20]{1,0} custom-call(%x, %w), custom_call_target="__cublas$lt$matmul"'
    both = "  %w = f32[8,20]{1,0} fusion(%wq, %wk), kind=kLoop, calls=%wrapped_concatenate_computation"
    lines = [line for line in replaced(Q, f"{both}\n{joined}") if line != K]
    found = order_violations(hlo([line.replace("%k", "%q") for line in lines]), WIDTHS, receives=True)
    assert "send of q and product of k, v: q does not depend on send_q" in found


def test_messages_in_another_order_are_found():
    loose = replaced(SEND_KV, SEND_KV.replace("%fence", "%stamp"))
    found = order_violations(hlo(loose), WIDTHS, receives=True)
    assert found == []  # it still depends on send_q through k
    loose = replaced(SEND_Q, SEND_Q.replace("%recv, %q", "%stamp, %x"))
    found = order_violations(hlo(loose), WIDTHS, receives=True)
    assert found == [
        "message: send_q does not depend on recv",
        "product of q and send of q: send_q does not depend on q",
    ]


@pytest.mark.parametrize("missing", [RECV, SEND_Q, SEND_KV, Q, K])
def test_what_is_missing_is_found(missing):
    lines = [line for line in GOOD if line != missing]
    assert any("found none" in v for v in order_violations(hlo(lines), WIDTHS, receives=True))


def test_a_recv_in_the_first_slice_is_found():
    assert order_violations(hlo(GOOD), WIDTHS, receives=False) == ["expected no recv in the first slice, found one"]


def test_computation_that_the_recv_does_not_wait_for_is_found():
    assert early_violations(hlo(replaced(EARLY, call("early", "fence", "%stamp"))), [r" cosine\("]) == [
        "early computation and recv: recv does not depend on cos"
    ]


def test_modules_without_a_schedule_are_refused():
    with pytest.raises(ValueError, match="scheduled HLO"):
        Hlo.parse("HloModule m\n\nENTRY %main () -> () {\n}\n")


def test_products_of_one_shape_are_refused():
    with pytest.raises(ValueError, match="cannot be told apart"):
        Widths(q=(8, 8), kv=(8, 8))
