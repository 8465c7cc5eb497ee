"""Where everything lies in the flat arrays: slots of the headers and the constants of the index.

Three int64 records address all memory:

- an *index header* (one per tenant): the paged tokens of earlier responses, their hash chains, the calibration;
- a *request row* (one per live request): its own prompt and output with their hash chains, and its last draft;
- nothing else. Scratch memory of the drafting kernels belongs to the table of request rows.
"""

from __future__ import annotations

from typing import Final

# --- context orders -------------------------------------------------------------------------------------------------
# A position is found by the hash of its last 1, 2, 6 and 16 tokens. More orders bring nothing on the traces.
NUM_ORDERS: Final = 4
ORDER_0: Final = 1
ORDER_1: Final = 2
ORDER_2: Final = 6
ORDER_3: Final = 16

# --- pages ----------------------------------------------------------------------------------------------------------
PAGE_BITS: Final = 6
PAGE_SIZE: Final = 1 << PAGE_BITS  # tokens
PAGE_MASK: Final = PAGE_SIZE - 1
TAIL: Final = 8  # prompt tokens kept before a cached response: they let another request predict its first tokens
BLOCK: Final = 64  # tokens appended at a time: their heads are asked for from memory together
WIPED: Final = -1  # the token of a free position; it equals no token of a context, so stale links fail to match

# --- search ---------------------------------------------------------------------------------------------------------
MAX_CANDIDATES: Final = 16  # per source; newest first: the 8 newest predict better than the 64 newest
ENOUGH_CANDIDATES: Final = 6  # after so many the shorter contexts are not searched
MAX_WALK: Final = 12  # links followed per order and source; 24 bring next to nothing and cost a third of the time
SHORT_WALK: Final = 8  # the same for the context of one token
MAX_MATCH: Final = 72  # tokens compared backwards; longer matches are as good as equal
NUM_SOURCES: Final = 3  # own text, tenant's earlier responses, shared tier
MAX_DRAFT: Final = 256  # nodes of one draft
MAX_BRANCHES: Final = 512  # open branches of a tree search
MAX_MEMBERS: Final = 4096  # candidates summed over the branches of a tree search

# --- index header ---------------------------------------------------------------------------------------------------
(
    X_TOKENS,  # int32 [pages * PAGE_SIZE]
    X_LINKS,  # int32 [positions * NUM_ORDERS]: the previous position with the same hash
    X_HEADS,  # int32 [buckets * NUM_ORDERS]: the newest position of each bucket
    X_PAGE_NEXT,  # int32 [pages]
    X_PAGE_PREV,  # int32 [pages]
    X_PAGE_OWNER,  # int32 [pages]: sequence number, 0 = free
    X_FREE,  # int32 [pages]: returned pages, a stack
    X_NUM_FREE,
    X_NUM_PAGES,  # pages ever used: [1, X_NUM_PAGES) are in use or on the free stack; page 0 is never used
    X_MAX_PAGES,
    X_NUM_BUCKETS,  # grows by one bucket at a time (linear hashing), so there is no pause
    X_BUCKET_MASK,  # 2 * (largest power of two <= X_NUM_BUCKETS) - 1
    X_NUM_POSITIONS,  # tokens held, tails included
    X_CELLS,  # float32 [tables, CELL_WIDTH]: calibration, see calibration.py
    X_WEIGHTS,  # float32
    X_NUM_RECYCLED,  # pages ever returned: chains can hold cycles after the first
    X_FROZEN,  # 1: calibration does not learn
    X_TICK,  # counts appends and searches: the clock of the LRU order
    X_FIRST_PAGE,  # int32 [sequences]
    X_LAST_USED,  # int32 [sequences]: tick of the last append to it or longest match in it
    INDEX_SLOTS,
) = range(21)

# --- request row ----------------------------------------------------------------------------------------------------
(
    R_TOKENS,  # int32 [capacity + 1]: position 0 holds a token that matches nothing; tokens[length] = WIPED
    R_LINKS,  # int32 [capacity * NUM_ORDERS]
    R_HEADS,  # int32 [buckets * NUM_ORDERS]
    R_LENGTH,  # tokens held, position 0 included
    R_CAPACITY,  # the largest R_LENGTH that fits
    R_ROOM_MADE,  # 1: room was made for the next tokens as far as that is possible
    R_BUCKET_MASK,  # buckets - 1, a power of two minus one
    R_INDEX,  # address of the tenant's index header, 0 = none
    R_SHARED,  # address of the shared tier's header, 0 = none
    R_SEQUENCE,  # sequence number in the tenant's index; 0 = not cached, negative = cached no further
    R_POSITION,  # last position of the cached response, 0 = none yet
    R_DRAFTED,  # nodes of the pending draft
    R_HISTORY,  # what became of the last draft, see calibration.py
    R_DRAFT,  # address of the draft record: int32 [MAX_DRAFT * RECORD_WIDTH]
    R_PIN,  # own position that the longest match has reached, 0 = none
    R_PIN_LENGTH,
    R_PIN_CACHED,  # the same in the tenant's index
    R_PIN_CACHED_LENGTH,
    R_PIN_EPOCH,  # X_NUM_RECYCLED when the cached pin was set: a deletion since then voids it
    R_REACH,  # no own match can be longer: the longest of the last search and the tokens since
    R_REACH_CACHED,  # the same in the tenant's index
    R_HASH,  # rolling hashes of the last tokens: orders 1 to 3 here and behind (order 0 is the token itself)
    R_HASH_2,
    R_HASH_3,
    R_CHAINED,  # position of the last token in the cached response where its chains begin, 0 = not chained
    R_BEST_LENGTH,  # longest match of the last search
    R_SCRATCH,  # address of int32 [SCRATCH_SIZE], shared by all rows: kernels run one at a time
    ROW_SLOTS,
) = range(28)

# --- draft record: per node token, parent, the calibration inputs, the mixers' weight sets ----------------------------
NUM_INPUTS: Final = 8
NUM_MIXERS: Final = 2  # weights of an input: the sum of one set chosen by depth and one chosen by match length
NODE_CELLS: Final = NUM_INPUTS + NUM_MIXERS
D_TOKEN: Final = 0
D_PARENT: Final = 1
D_INPUT: Final = 2
RECORD_WIDTH: Final = D_INPUT + NODE_CELLS
D_VALUES: Final = MAX_DRAFT * RECORD_WIDTH  # float32 [MAX_DRAFT] behind the nodes: probability of each node's path
RECORD_SIZE: Final = D_VALUES + MAX_DRAFT

# --- scratch: regions of one int32 array ----------------------------------------------------------------------------
GROUPS: Final = NUM_SOURCES * MAX_CANDIDATES  # most candidates, and so most different next tokens
CANDIDATE_ROWS: Final = 6
S_CANDIDATES: Final = 0  # rows of GROUPS: position, match length, source, rank, match beyond a mismatch, distance
S_NEXT: Final = S_CANDIDATES + CANDIDATE_ROWS * GROUPS  # next token of each member
S_GROUP: Final = S_NEXT + GROUPS  # GROUP_WIDTH values per different next token
GROUP_WIDTH: Final = 6
S_INPUTS: Final = S_GROUP + GROUP_WIDTH * GROUPS  # calibration cells of two nodes under consideration
S_MEMBER: Final = S_INPUTS + 2 * NODE_CELLS  # position and candidate of each member of each branch
S_BRANCH: Final = S_MEMBER + 2 * MAX_MEMBERS
BRANCH_WIDTH: Final = 5 + NODE_CELLS  # parent, token, first member, members, depth, inputs
S_FLOAT: Final = S_BRANCH + BRANCH_WIDTH * MAX_BRANCHES  # float32: weight of each group, probability of each branch
S_KEYS: Final = S_FLOAT + GROUPS + MAX_BRANCHES  # [BLOCK, NUM_ORDERS]: bucket keys of tokens that are being appended
SCRATCH_SIZE: Final = S_KEYS + BLOCK * NUM_ORDERS
