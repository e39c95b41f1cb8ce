from lamina_jax.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput


def test_a_completion_is_finished_once_it_has_a_reason():
    assert not CompletionOutput(index=0, text="a", token_ids=[1]).finished
    assert CompletionOutput(index=0, text="a", token_ids=[1], finish_reason="length").finished


def test_metrics_are_optional():
    output = RequestOutput(request_id="7", prompt=None, prompt_token_ids=[1], outputs=[], finished=False)
    assert output.metrics is None
    assert RequestMetrics(arrival_time=1.0).first_token_time is None
