#!/bin/sh
# The on-device lab from end to end: the three commands of the tutorial, then the chat script. See README.md.
set -eu
unset PYTHONPATH
started=$(date +%s)

olive quantize --model_name_or_path model --trust_remote_code --algorithm awq --output_path models/phi/awq --log_level 1

olive finetune --method lora --model_name_or_path models/phi/awq --data_files data/data_sample_travel.jsonl \
  --data_name json --text_template "<|user|>\n{prompt}<|end|>\n<|assistant|>\n{response}<|end|>" --max_steps 100 \
  --output_path ./models/phi/ft --log_level 1

olive auto-opt --model_name_or_path models/phi/ft/model --adapter_path models/phi/ft/adapter --device cpu \
  --provider CPUExecutionProvider --use_ort_genai --output_path models/phi/onnx-ao --log_level 1

echo
python app.py "what is the best thing to see in chicago"
echo
echo "the lab took $(($(date +%s) - started)) s"
echo "checkpoint before: $(du -sh model | cut -f1)  ONNX after: $(du -sh models/phi/onnx-ao/model | cut -f1)"
echo "report: examples/lab/models/phi/onnx-ao.report.html"
