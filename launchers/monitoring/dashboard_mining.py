"""What hard negatives do to the loss, and what is learnt."""

from __future__ import annotations

from tvr.launchers.monitoring.grafana import Dashboard, Panel, Query
from tvr.launchers.monitoring.queries import RECALL, RUN, latest

MINING = Dashboard(
    uid="tvr-mining",
    title="tvr: hard-negative mining",
    panels=(
        Panel(
            title="Hard negatives of a text",
            queries=(latest("tvr_train_hard_negatives_per_row"),),
            about="Negatives above the positive. It falls as the model learns; one that stays at"
            " the batch's size: nothing is learnt.",
        ),
        Panel(
            title="Penalty of hard negatives",
            queries=(
                Query('max by (run) (tvr_train_loss{run=~"$run", term="penalty"})', "{{run}}"),
            ),
            about="What NegNCE adds to the loss, weight included.",
        ),
        Panel(
            title="Penalty, share of the loss",
            unit="percentunit",
            queries=(
                Query(
                    'max by (run) (tvr_train_loss{run=~"$run", term="penalty"}) / '
                    'max by (run) (tvr_train_loss{run=~"$run", term="similarity"})',
                    "{{run}}",
                ),
            ),
            about="Of the similarity's loss.",
        ),
        Panel(
            title="Similarity of positives and hardest negatives",
            queries=(
                latest("tvr_train_positive_similarity", name="positives"),
                latest("tvr_train_hardest_negative_similarity", name="hardest negatives"),
            ),
            about="Means of the last step; up to 1.25 with neighbour frames. Apart: good. Both near"
            " that: features collapse.",
        ),
        Panel(
            title="Margin in logits",
            queries=(
                Query(
                    f"(max by (run) (tvr_train_positive_similarity{RUN}) - max by (run) "
                    f"(tvr_train_hardest_negative_similarity{RUN})) / max by (run) "
                    f"(tvr_train_temperature{RUN})",
                    "{{run}}",
                ),
            ),
            about="Positive above hardest negative, over the temperature.",
        ),
        Panel(
            title="Positives without gradient",
            unit="percentunit",
            queries=(latest("tvr_train_zero_gradient_positives_ratio"),),
            about="Under the clamp of NegNCE's reference mode: the worst positives, which learn"
            " nothing. The mode `log` has none.",
        ),
        Panel(
            title="Weight and temperature",
            queries=(
                latest("tvr_train_negative_weight", name="weight"),
                latest("tvr_train_temperature", name="temperature"),
            ),
            about="Of the penalty, and of the logits.",
        ),
        Panel(
            title="Recall",
            unit="percentunit",
            queries=(RECALL,),
            about="Of the last evaluation.",
        ),
        Panel(
            title="Ranks of the right answers",
            queries=(
                latest("tvr_evaluation_median_rank", "split", "direction", name="median"),
                latest("tvr_evaluation_mean_rank", "split", "direction", name="mean"),
            ),
            about="Median and mean, from 1.",
        ),
        Panel(
            title="Binding",
            unit="percentunit",
            queries=(latest("tvr_evaluation_binding_accuracy_ratio"),),
            about="Captions nearer to their own clip than to its exchanged counterpart; chance is"
            " 50 %.",
        ),
        Panel(
            title="Evaluated at step",
            queries=(latest("tvr_evaluation_step"),),
            about="The last time.",
        ),
    ),
)
