"""
What all command lines share: a mistake is one line that names the closest flag, and help shows defaults where there are
some.
"""
import argparse
import difflib
import re
import sys


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the default of every flag that has one"""

    def _get_help_string(self, action):
        return action.help if action.default in (None, "", False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse's, but for what it says of a mistake: exit status 2 after one line on standard error, without usage"""

    def parse_known_args(self, args=None, namespace=None):
        self.words = [str(word).partition("=")[0] for word in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    def error(self, message):
        known = self._option_string_actions
        unknown = [word for word in self.words if re.match("-+[a-z_]", word) and word not in known]
        if unknown and re.match("unrecognized|.*invalid", message):
            message = f"there is no flag {unknown[0]}{self.closest(unknown[0])}"
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def closest(self, word):
        """What could have been meant by a flag that does not exist, in words"""
        visible = [name for name, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
        alike = [name for name in visible if (name.startswith(word) if len(word) > 3 else word.startswith(name))]
        near = alike or difflib.get_close_matches(word, visible)
        return f": is {near[0]} meant?" if near else ""
