"""rollout.backend=server: vLLM's own HTTP servers, one or many, behind the surface of one engine.

launching  open_pool: the servers a configuration asks for; vLLM's command line and process (process_guard: inside of it)
pool       ServerPool: generate, ask, and the receiving side of weights.publish
dispatch   which server gets which request, what is known of each, and what becomes of a dead server's
roster     who belongs to the pool: found by ready files, examined, watched, taken in again; greeting: what a run refuses
client     one server's HTTP routes; wire: what travels over them
"""
