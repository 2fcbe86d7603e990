"""HTTP to the servers: one chat request, how many at once, which server, how long a text fits.

Retries, rate limits and odd answers end here, so that a job sees a text or a reason. It may import
``gen.prompts``.
"""
