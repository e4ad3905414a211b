"""rollout.backend=server: vLLM's own HTTP servers, one or many, behind the surface of one engine.

launching  open_pool: the servers a configuration asks for; vLLM's command line and process
pool       ServerPool: generate, ask, and the receiving side of weights.publish
dispatch   which server gets which request, and what becomes of a dead server's
roster     who belongs to the pool: greeted, examined, watched, taken in again; members: what is known of each
client     one server's HTTP routes; wire: what travels over them
handshake  what a run refuses; identity: what the workers say of themselves
every_engine  an RPC reaches all data-parallel engines of a server, and all answer
command    rlalign rollout-server; ready: how servers are found; guard: the key in front of them
"""
