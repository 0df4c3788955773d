"""What surrounds the model in `SmolLm3.py`: a module for each noun of the story."""


class WorkflowError(Exception):
    """Something the user can mend, in one line: WHERE: WHAT is wrong; DO this.

    `main.py` prints it and leaves with `exit_code`; in the notebook it is the exception's message.
    """

    exit_code = 2  # bad input or configuration

    def __init__(self, where: object, what: str, do: str):
        super().__init__(f"{where}: {what}; {do}")
