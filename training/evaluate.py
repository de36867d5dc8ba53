"""Evaluate a trained model on held-out real images of every context (METHOD section 5;
arXiv:2507.04754).

    python training/evaluate.py --model outputs/quad/model --dataset quad --output outputs/quad/metrics

What the command does, from top to bottom, is in `hf_intervene/evaluation/command.py`; what is
measured, in `measuring.py` beside it. `hf-intervene evaluate` is the same command."""  # noqa: E501

import sys

from hf_intervene.evaluation.command import main


if __name__ == "__main__":
    sys.exit(main())
