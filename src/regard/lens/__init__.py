"""Looking: `record.py` keeps what a model looked at in one forward (`regard.record`); probes and pictures read such a record."""

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:  # names that a file of this package has too: what they mean to a type checker
    from .attention_influence import attention_influence as attention_influence
    from .context_dependency import context_dependency as context_dependency
    from .corpus_influence import corpus_influence as corpus_influence
    from .head_atlas import head_atlas as head_atlas
    from .icl_circuits import icl_circuits as icl_circuits
    from .logit_attribution import logit_attribution as logit_attribution
    from .look import look as look
    from .retrieval_heads import retrieval_heads as retrieval_heads
    from .saliency import saliency as saliency

_TABLE = {
    "attention_boundaries": ".boundaries",
    "attention_agreement": ".agreement",
    "correlation": ".agreement",
    "rationale_agreement": ".agreement",
    "ModelScore": ".saliency",
    "attention_rollout": ".saliency",
    "gradient_input": ".saliency",
    "integrated_gradients": ".saliency",
    "occlusion": ".saliency",
    "saliency": ".saliency",
    "GradientConflict": ".click_models",
    "cluster_information": ".click_models",
    "gradient_conflict": ".click_models",
    "learned_correlation": ".click_models",
    "search_quality": ".click_models",
    "target_information": ".click_models",
    "look": ".look",
    "ICLCircuits": ".icl_circuits",
    "icl_circuits": ".icl_circuits",
    "attention_entropy": ".probes",
    "attention_influence": ".attention_influence",
    "answered_by_dense": ".attention_influence",
    "influence_blocks": ".attention_influence",
    "span_plan": ".span_search",
    "span_plans": ".span_search",
    "sink_mass": ".probes",
    "sink_rate": ".sink",
    "sink_scores": ".sink",
    "column_importance": ".sink",
    "model_weights": ".sink",
    "activation_norms": ".sink",
    "locality": ".probes",
    "previous_token": ".probes",
    "induction": ".probes",
    "duplicate_token": ".probes",
    "profile": ".probes",
    "SpanMass": ".attention_mass",
    "row_mass": ".attention_mass",
    "span_mass": ".attention_mass",
    "ContextDependency": ".context_dependency",
    "context_dependency": ".context_dependency",
    "span_dependency": ".context_dependency",
    "keyword_recall": ".rouge",
    "CorpusReport": ".corpus_files",
    "corpus_documents": ".corpus_files",
    "rank_corpus": ".corpus_files",
    "score_files": ".corpus_files",
    "CorpusScore": ".corpus_influence",
    "corpus_influence": ".corpus_influence",
    "document_losses": ".corpus_influence",
    "influence_heads": ".corpus_influence",
    "select_top": ".corpus_influence",
    "KeyValueProbes": ".key_values",
    "Record": ".record",
    "Patcher": ".patching",
    "total_effects": ".patch_effects",
    "path_effects": ".patch_effects",
    "direct_effects": ".patch_effects",
    "logit_attribution": ".logit_attribution",
    "LogitAttribution": ".logit_attribution",
    "LogitDifference": ".answer_metrics",
    "AnswerProbability": ".answer_metrics",
    "AnswerLogProb": ".answer_metrics",
    "AnswerRank": ".answer_metrics",
    "AnswerCorrect": ".answer_metrics",
    "LabelMargin": ".answer_metrics",
    "LabelLoss": ".answer_metrics",
    "HeadScores": ".head_scores",
    "HeadAtlas": ".head_atlas",
    "head_atlas": ".head_atlas",
    "plot_scores": ".head_plot",
    "repeated_tokens": ".head_atlas",
    "retrieval_heads": ".retrieval_heads",
    "Needle": ".needle",
    "NeedleHaystack": ".needle",
    "find_span": ".needle",
    "profile_heads": ".head_profile",
    "search_heads": ".head_search",
    "next_token_objective": ".head_search",
    "tune_gamma": ".head_profile",
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, _TABLE)
