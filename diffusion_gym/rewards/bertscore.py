"""BERTScore, the similarity of two sentences by the contextual embeddings of their words: the bert-score package's."""

from collections.abc import Sequence
from functools import partial

import torch
from bert_score.utils import bert_cos_score_idf, model2layers
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from .. import transfer
from .model_based import fetch_model, pretrained

MODEL = "BERTScore's model"
DEBERTA = "microsoft/deberta-xlarge-mnli"
MAX_TOKENS = 512  # some tokenizers (DeBERTa's) name no limit, and bert-score cannot do without


class _UpToLayer(nn.Module):
    """An encoder that ends with one of its layers, as bert-score calls it."""

    def __init__(self, encoder: nn.Module, num_layers: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_layers = num_layers

    def forward(self, ids: Tensor, attention_mask: Tensor, output_hidden_states: bool) -> tuple[Tensor]:
        states = self.encoder(ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states
        return (states[self.num_layers],)


class _Weights(dict[int, float]):
    """The weights of tokens: 1, but for those that are named."""

    def __missing__(self, token: int) -> float:
        return 1.0


def layer_of(source: str, num_layers: int | None) -> int:
    """Return the layer that embeds, counted from 1: the one asked for, or the best by bert-score's authors.

    Raises:
        ValueError: none is asked for, and bert-score knows none.
    """
    if num_layers is None and source not in model2layers:
        raise ValueError(
            f"bert-score knows no best layer for {source!r}: say which layer embeds, num_layers=... "
            f"(for a folder of {DEBERTA}: {model2layers[DEBERTA]})"
        )
    return model2layers[source] if num_layers is None else num_layers


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or a Hub id.

    Raises:
        ValueError: there is none.
    """
    load = partial(AutoTokenizer.from_pretrained, trust_remote_code=False)
    return pretrained(load, source, what="BERTScore's tokenizer", keyword="bert_score")


def fetch(source: str, num_layers: int | None) -> None:
    """Fetch the files of a folder or a Hub id to this machine.

    Raises:
        ValueError: they cannot be had, or there is no layer to take.
    """
    layer_of(source, num_layers)
    fetch_model(source, what=MODEL, keyword="bert_score")
    load_tokenizer(source)


class BertScore:
    """BERTScore's precision, recall and F1 of candidates against references, without idf and baseline rescaling.

    R = 1/|x| Σ_{i in x} max_{j in x̂} cos(x_i, x̂_j) over the tokens of the reference x and of the candidate x̂, embedded
    by a layer of a language model; P is the same with the roles exchanged, F1 their harmonic mean.

    Source: Zhang et al. 2020, BERTScore, eq. 1 to 3, https://arxiv.org/abs/1904.09675.

    Note:
        The matching is bert-score's own. The model is loaded here, for bert-score would take a folder with "t5"
        anywhere in its path for a T5, and keep DeBERTa in its checkpoint's float16.

    Args:
        source: The language model, an encoder such as BERT, RoBERTa or DeBERTa: a folder or a Hub id.
        num_layers: The layer that embeds, counted from 1; None: the one that bert-score's authors found best for this
            id (40 for microsoft/deberta-xlarge-mnli).
        device: The device that it computes on, in float32.

    Raises:
        ValueError: the model cannot be had, is no encoder, has not as many layers, or is none that bert-score knows the
            best layer of.
    """

    def __init__(self, source: str = DEBERTA, *, num_layers: int | None = None, device: torch.device) -> None:
        num_layers = layer_of(source, num_layers)
        load = partial(AutoModel.from_pretrained, trust_remote_code=False)
        encoder = pretrained(load, source, what=MODEL, keyword="bert_score")
        if encoder.config.is_encoder_decoder or not 1 <= num_layers <= encoder.config.num_hidden_layers:
            raise ValueError(
                f"BERTScore takes an encoder and one of its layers; {source!r} is a {encoder.config.model_type} with "
                f"{encoder.config.num_hidden_layers} layers, and num_layers={num_layers}"
            )
        self.tokenizer = load_tokenizer(source)
        self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, MAX_TOKENS)
        self.device = device
        self.network = _UpToLayer(encoder.to(device, torch.float32).requires_grad_(False), num_layers).eval()
        self.weights = _Weights({self.tokenizer.cls_token_id: 0.0, self.tokenizer.sep_token_id: 0.0})

    def __call__(self, candidates: Sequence[str], references: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return precision, recall and F1, [B] float32 on the host each; an empty candidate has 0.

        Args:
            candidates: B sentences.
            references: B sentences, none of them empty.
        """
        scores = torch.zeros(len(candidates), 3)
        # bert-score gives an empty candidate 0 too, but fails with transformers 5
        filled = [index for index, candidate in enumerate(candidates) if candidate.strip()]
        if filled:
            columns = bert_cos_score_idf(
                self.network,
                [references[index] for index in filled],
                [candidates[index] for index in filled],
                self.tokenizer,
                self.weights,
                device=self.device,
            )
            scores[filled] = torch.from_numpy(transfer.to_host(columns))
        precision, recall, f1 = scores.unbind(1)
        return precision, recall, f1
