"""How good a model is: language-model loss, reward accuracy, judged responses, win rates."""
