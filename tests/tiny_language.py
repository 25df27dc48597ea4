"""Small language models of real classes with random weights, in the layout that the Hub's have."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    DebertaConfig,
    DebertaModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)

WORDS = [
    "a", "an", "the", "is", "and", "of", "image", "contains", "cat", "dog", "bear", "fox", "playing", "chess", "riding",
    "bike", "washing", "dishes", "two", "three",
]  # fmt: skip
QUESTION_WORDS = [
    "USER", ":", "ASSISTANT", "Answer", "concisely", "what", "going", "on", "in", "this", "?", "How", "many",
]  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# That of llava-hf/llava-1.5-13b-hf, but for assistants' earlier words.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SIZE, PATCH = 28, 14


def _llava_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    vocabulary = {word: index for index, word in enumerate([*special, *QUESTION_WORDS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],  # as LLaVA's own
    )


def make_tiny_llava(folder: Path, *, next_generation: bool = False, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write a LLaVA (or LLaVA-NeXT) folder: images of 28 pixels, 4 patches, sentences of some 40 words."""
    tokenizer = _llava_tokenizer()
    tokenizer.save_pretrained(folder)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.5,
    )
    config_class, model_class, extra = LlavaConfig, LlavaForConditionalGeneration, {}
    if next_generation:
        extra = {"image_grid_pinpoints": [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]}
        config_class, model_class = LlavaNextConfig, LlavaNextForConditionalGeneration
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(
            config_class(
                vision_config=vision,
                text_config=text,
                image_token_index=image_token,
                **extra,
            )
        )
        for parameter in model.parameters():
            parameter.data.mul_(2)  # so that other images give other words
        model.lm_head.weight.data[image_token] = 0  # which a trained one does not say either: it stands for an image
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model.save_pretrained(folder)
    image_processor = {
        "image_processor_type": "LlavaNextImageProcessor" if next_generation else "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
        **extra,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor))
    processor = {
        "processor_class": "LlavaNextProcessor" if next_generation else "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": PATCH,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    if chat_template is not None:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": chat_template}))
    return folder


def make_tiny_bert(folder: Path, **config) -> Path:
    """Write a BERT folder of three layers: the words above, and letters for all others."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*WORDS, *LETTERS])]
    vocabulary += [f"##{letter}" for letter in LETTERS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = BertModel(
            BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                initializer_range=0.3,
                **config,
            )
        )
    for layer in model.encoder.layer:  # no cosine is negative then: bert-score takes padding's 0 for larger
        layer.output.LayerNorm.bias.data.fill_(1)
    model.save_pretrained(folder)
    return folder


def make_tiny_deberta(folder: Path) -> Path:
    """Write a DeBERTa folder of three layers that reads bytes, and names no longest sentence, as the published do."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "DebertaTokenizer"}))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = DebertaModel(
            DebertaConfig(
                vocab_size=len(vocabulary),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                initializer_range=0.3,
                relative_attention=True,
                pos_att_type=["c2p", "p2c"],
                position_biased_input=False,
                type_vocab_size=0,
                pad_token_id=1,
            )
        )
    model.half().save_pretrained(folder)
    return folder
