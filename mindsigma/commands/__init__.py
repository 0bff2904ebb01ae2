"""The commands: each parses its options, does its work, returns the exit code. tools/ has a file for each."""

from mindsigma.environment import end_on_wrong_python

end_on_wrong_python()  # before a command imports what that Python may not have
