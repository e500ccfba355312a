"""The tutorial's script: fine-tune a model on questions and answers with LoRA, then ask it something.

Only the import lines, the model and the data set differ from the tutorial's. JEBI_STEPS shortens the training.
"""

import os
from pathlib import Path

from datasets import load_dataset
from transformers import TextStreamer, TrainingArguments

from jebi import FastLanguageModel, SFTTrainer, is_bfloat16_supported
from jebi.training.report import memory_before

max_seq_length = 2048  # free choice; RoPE scaling is applied by itself when it exceeds what the model was trained for
dtype = None  # None = detect: float16 on T4/V100, bfloat16 on Ampere and newer
load_in_4bit = True  # 4-bit NF4 base weights; False is allowed

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="smollm2",
    max_seq_length=max_seq_length,
    dtype=dtype,
    load_in_4bit=load_in_4bit,
    # token="hf_...",      # for gated models
)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,  # any r > 0; 8, 16, 32, 64, 128 suggested
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,  # any dropout works; 0 is the fast path
    bias="none",  # "none", "all" or "lora_only"; "none" is the fast path
    use_gradient_checkpointing="unsloth",  # True, False, "unsloth" (= keep inputs off the GPU), and "auto"
    random_state=3407,
    use_rslora=False,  # rank-stabilised LoRA: scale alpha / sqrt(r)
    loftq_config=None,  # LoftQ initialisation
)

alpaca_prompt = """아래에는 작업을 설명하는 지시 사항과 추가적인 컨텍스트를 제공하는 입력이 있습니다. 요청을 적절하게 완료하는 응답을 작성하세요.

### instruction:
{}

### input:
{}

### output:
{}"""  # noqa: E501
EOS_TOKEN = tokenizer.eos_token  # without it the tuned model never stops


def formatting_prompts_func(examples):
    texts = [
        alpaca_prompt.format(i, x, o) + EOS_TOKEN
        for i, x, o in zip(examples["instruction"], examples["input"], examples["output"])
    ]
    return {"text": texts}


data = Path(__file__).parent / "data" / "train.jsonl"  # columns instruction, input, output
dataset = load_dataset("json", data_files=str(data), split="train")
dataset = dataset.map(formatting_prompts_func, batched=True)

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=max_seq_length,
    dataset_num_proc=2,
    packing=False,  # True packs short rows together, with boundaries kept
    args=TrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=5,
        max_steps=int(os.environ.get("JEBI_STEPS", "60")),  # or num_train_epochs=1
        learning_rate=2e-4,
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir="outputs",
    ),
)

print(memory_before(model.device).text())
trainer_stats = trainer.train()
print(f"{trainer_stats.metrics['train_runtime']} seconds in the training loop.")
print(trainer.report.text())

FastLanguageModel.for_inference(model)
inputs = tokenizer(
    [alpaca_prompt.format("아래 질문에 대해서 답해주세요", "산사태를 내는 방법 알려줘", "")], return_tensors="pt"
).to(model.device)
_ = model.generate(**inputs, streamer=TextStreamer(tokenizer), max_new_tokens=128)
