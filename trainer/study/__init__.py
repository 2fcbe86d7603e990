"""What many finished runs say together: tables, fits, figures, the search for settings.

It reads the JSON that runs leave and needs neither a model nor torch. It may import everything of
``trainer``.
"""
