"""An environment of one's own, as a run names it: tests.talks:TwoSums."""

from rlalign.tasks.environments import Observation


class TwoSums:
    """Asks the prompt's sum, then a second one; a failure where the answer says nothing."""

    SECOND, SUM = "12 + 25 =", "37"

    def __init__(self, prompt, task):
        self.prompt, self.task, self.turn = prompt, task, 0

    def start(self):
        return [{"role": "user", "content": self.prompt.text}]

    async def step(self, messages):
        self.turn += 1
        answer = str(messages[-1]["content"]).strip()
        if self.turn == 1:
            if answer.endswith("7"):
                raise ConnectionError("the tool hung up")
            right = self.task.reward(self.prompt, answer)
            return Observation(messages=[{"role": "user", "content": self.SECOND}], reward=right)
        return Observation(reward=float(answer == self.SUM), done=True)


class AlwaysRight:
    """A task that likes every answer."""

    def reward(self, prompt, answer):
        return 1.0
