"""What a trained model is worth, as functions of a model and texts, or of what it wrote; what texts hold.

- `likelihood`: mean loss and perplexity of a language model, the loss of each token of a text, how likely
  continuations are, as benchmarks ask for.
- `questions`, `benchmarks`, `suite`, `suite_report`: questions and their files, tasks and metrics, asking a
  model all of them, the page. `bias`, `bias_words`, `memorisation` and `harness` have tasks of their own,
  `continuations` has texts that a model writes.
- `classifier`: a classifier's scores on labelled texts, and its predictions for others.
- `answers`: answers to instructions, and whether they are well-formed.
- `statistics`: how varied, repetitive and likely generated texts are.
- `memorisation`: how much of them is copied from the training text, and where that is found.
- `corpus_report`: what a corpus holds, to look at before training.
- `loss_curves`: what the losses of a run show, in words; the learning-rate range test.
"""
