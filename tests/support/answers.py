"""A stand-in for a text encoder that writes."""


class Writer:
    """Answers in turn, the last one again and again; what it was asked is in `calls`."""

    def __init__(self, *answers, ended=True):
        self.answers, self.ended, self.calls = list(answers), ended, []

    def __call__(self, chat, sampling, max_tokens, seed):
        self.calls.append((chat, sampling, max_tokens, seed))
        return self.answers[min(len(self.calls), len(self.answers)) - 1], self.ended
