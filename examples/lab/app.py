"""Chat with the lab's model: each question is answered by the base and by the travel adapter.

    python app.py ["a question"]

Without a question it asks for one, again and again, until an empty line.
"""

import sys

import onnxruntime_genai as og

FOLDER = "models/phi/onnx-ao/model"
TEMPLATE = "<|user|>\n{prompt}<|end|>\n<|assistant|>\n"

model = og.Model(FOLDER)
adapters = og.Adapters(model)
adapters.load(f"{FOLDER}/adapter_weights.onnx_adapter", "travel")
tokenizer = og.Tokenizer(model)


def answer(question: str, adapter: str | None = None, max_new_tokens: int = 80) -> None:
    """Print an answer token by token, as it is generated."""
    ids = tokenizer.encode(TEMPLATE.format(prompt=question))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + max_new_tokens, do_sample=False)
    generator = og.Generator(model, params)
    if adapter:
        generator.set_active_adapter(adapters, adapter)  # before any token is appended
    generator.append_tokens(ids)
    stream = tokenizer.create_stream()
    while not generator.is_done():
        generator.generate_next_token()
        print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
    print()


def ask(question: str) -> None:
    """Answer with the base, then with the adapter."""
    print(f"Question: {question}")
    print("Base:     ", end="")
    answer(question)
    print("Travel:   ", end="")
    answer(question, "travel")


if len(sys.argv) > 1:
    ask(" ".join(sys.argv[1:]))
else:
    while question := input("Question (empty ends): ").strip():
        ask(question)
