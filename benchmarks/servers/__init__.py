"""Generation servers: a stand-in for one, engines without their server, and how they compare.

Only ``compare`` imports anything of the project; the others run as files.
"""
