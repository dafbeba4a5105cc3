"""One training scenario, written once for every client that has the official client's names.

As a script it runs with whichever client is installed beside it and prints what it saw as JSON:

    python scenario.py --client tinker --url http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import struct
from typing import Any

MODEL = "holdfast-tiny"
BEFORE, AFTER = (1, 2, 3), (4, 5)


def batch(types: Any, seed: int) -> list[Any]:
    """Random sequences with real weights; equal seeds give equal batches in every client."""
    draw = random.Random(seed)
    data = []
    for length in (24, 7, 31):
        tokens = [draw.randrange(3, 250) for _ in range(length + 1)]
        weights = [round(draw.uniform(-0.5, 2.0), 3) for _ in range(length)]
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": types.TensorData(
                        data=tokens[1:], dtype="int64", shape=[length]
                    ),
                    "weights": types.TensorData(data=weights, dtype="float32", shape=[length]),
                },
            )
        )
    return data


def done(value: Any) -> Any:
    """A result, whether the client gave a future of it or the thing itself."""
    return value.result() if hasattr(value, "result") else value


def seen(output: Any) -> dict[str, Any]:
    """All of a forward's result, floats to the last bit."""
    return {
        "loss": float(output.metrics["loss:sum"]).hex(),
        "logprobs": [
            struct.pack(f"<{len(item['logprobs'].data)}f", *item["logprobs"].data).hex()
            for item in output.loss_fn_outputs
        ],
        "shapes": [list(item["logprobs"].shape or ()) for item in output.loss_fn_outputs],
    }


def train(types: Any, client: Any, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Steps on the batches of these seeds, sent ahead; what each showed, and a probe."""
    adam = types.AdamParams(learning_rate=2e-3, weight_decay=0.1, grad_clip_norm=5.0)
    sent = []
    for seed in seeds:
        gradients = client.forward_backward(batch(types, seed), "cross_entropy")
        sent.append((gradients, client.optim_step(adam)))
    sent_probe = client.forward(batch(types, 1000), "cross_entropy")
    outputs = []
    for gradients, step in sent:
        outputs.append(seen(gradients.result()))
        step.result()
    outputs.append(seen(sent_probe.result()))
    return outputs


def scenario(client_module: Any, types: Any, url: str) -> dict[str, Any]:
    """Train, save, go on; resume with and without the optimizer, new and in place; sample."""
    service = client_module.ServiceClient(base_url=url, api_key="tml-scenario")
    client = done(service.create_lora_training_client(MODEL, rank=8, seed=7))
    results: dict[str, Any] = {"before": train(types, client, BEFORE)}
    path = done(client.save_state("scenario")).path
    results["uninterrupted"] = train(types, client, AFTER)
    results["in place"] = load_and_train(types, client.load_state_with_optimizer(path), client)
    results["in place, cold"] = load_and_train(types, client.load_state(path), client)
    results |= continued(client_module, types, url, path, service)
    sampler_path = done(client.save_weights_for_sampler("scenario")).path
    sampler = done(service.create_sampling_client(model_path=sampler_path))
    params = types.SamplingParams(max_tokens=8, temperature=0.0)
    prompt = types.ModelInput.from_ints([10, 20, 30])
    sampled = done(sampler.sample(prompt, 2, params))
    results["samples"] = [
        {
            "tokens": list(sequence.tokens),
            "logprobs": [float(value).hex() for value in sequence.logprobs],
            "stop_reason": str(sequence.stop_reason),
        }
        for sequence in sampled.sequences
    ]
    results["prompt logprobs"] = [
        None if value is None else float(value).hex()
        for value in done(sampler.compute_logprobs(prompt))
    ]
    rest = service.create_rest_client()
    run_id = path.removeprefix("tinker://").split("/")[0]
    results["checkpoints"] = sorted(
        (checkpoint.checkpoint_type, checkpoint.checkpoint_id)
        for checkpoint in done(rest.list_checkpoints(run_id)).checkpoints
    )
    results["path"] = path
    close = getattr(service, "close", None)
    if close is not None:
        done(close("success"))
    return results


def load_and_train(types: Any, load: Any, client: Any) -> list[dict[str, Any]]:
    load.result()
    return train(types, client, AFTER)


def continued(
    client_module: Any, types: Any, url: str, path: str, service: Any = None
) -> dict[str, Any]:
    """Go on from a checkpoint that any client saved: with its optimizer, and cold."""
    service = service or client_module.ServiceClient(base_url=url, api_key="tml-scenario")
    warm = done(service.create_training_client_from_state_with_optimizer(path))
    cold = done(service.create_training_client_from_state(path))
    return {"resumed": train(types, warm, AFTER), "cold": train(types, cold, AFTER)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--client", default="tinker")
    parser.add_argument("--url", required=True)
    parser.add_argument("--path", help="go on from this checkpoint instead")
    given = parser.parse_args()
    module = importlib.import_module(given.client)
    types = module.types
    if given.path:
        print(json.dumps(continued(module, types, given.url, given.path)))
    else:
        print(json.dumps(scenario(module, types, given.url)))


if __name__ == "__main__":
    main()
