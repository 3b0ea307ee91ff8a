"""Word lists and sentence patterns of the newsroom: only data, no code.

A pattern is a string of words. `{org}`, `{per}`, `{loc}`, `{prod}` (also `{org2}`, `{per2}`, …) are replaced by a name
of the event, `<class>` by a word of that class, `#` by a number. Classes have 5 or 10 words, because `grammar.py` holds
out one fifth of the *combinations* of pattern and words, and every word must stay equally frequent in both parts.
"""

TOPICS = ("energy", "banking", "retail", "technology", "health", "transport", "food", "media")
KINDS = ("results", "recall", "merger", "hearing", "launch", "strike", "expansion", "appointment")

# --- names: people, companies, places and products share one pool of roots, so that a name's form does not reveal its
# type

FIRST_NAMES = (
    "Ada Alma Amir Anton Bela Bruno Carla Cecil Clara Dana Dario Edith Elena Emil Erik Esther Farid Felix Freya "
    "Greta Hana Hector Hugo Ida Imran Ines Iris Ivan Jonas Judith Karim Lars Leila Lena Lorenz Lucia Magda "
    "Marco Maya Miriam Nadia Nils Noor Olga Oscar Pavel Petra Rana Rolf Rosa Samir Sonia Tara "
    "Theo Ursula Vera Viktor Wanda Yusuf Zoe"
).split()
ROOT_HEADS = (
    "Har Vel Brack Dun Cor Ash Mar Thorn Wes Kel Lin Rad Sten Tam Ober Pell Quin Row Sal Tor Ul Var Whit Yar "
    "Zan Bel Cal Dor Eld Fen Gal Hol Ing Jar Kirk Lor Mel Nor Orm Pen"
).split()
ROOT_MIDDLES = "a e i o en er in ol am ur".split()
ROOT_TAILS = (
    "lan mont well more vane ford wick by ton dale field stow ham ley mere rick den gate hurst mark nell son "
    "stead worth brook cott fell land ridge shaw"
).split()
ORDINARY_ROOTS = (
    "Summit Bridge Harbour Anchor Beacon Crown Mill Garden Orchard Compass".split()
)  # also common nouns: <thing>

PLACE_FORMS = ("{}", "{}", "{}", "Port {}", "North {}", "{} Bay", "New {}", "{} Falls")
PRODUCT_FORMS = ("{}", "{}", "{} 300", "{} X", "{} Plus", "{} Two", "{} 45", "{} Air")
COMPANY_FORMS = ("{} Group", "{} Holdings", "{} & Co", "{} {sector}", "{} {sector}", "{} {sector} Partners")
COMPANY_SECTOR = {
    "energy": "Energy",
    "banking": "Bank",
    "retail": "Stores",
    "technology": "Systems",
    "health": "Health",
    "transport": "Lines",
    "food": "Foods",
    "media": "Media",
}

# --- word classes

WORDS: dict[str, tuple[str, ...]] = {
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday"),
    "month": ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October"),
    "when": ("this week", "last week", "this month", "last month", "at the weekend"),
    "soon": ("next week", "next month", "in the spring", "in the autumn", "before winter"),
    "period": ("in the quarter", "in the half year", "in the season", "over the year", "in the period"),
    "role": ("chief executive", "finance chief", "chairwoman", "research head", "plant manager"),
    "job": ("engineer", "lawyer", "economist", "professor", "senator"),
    "say": ("said", "added", "explained", "argued", "wrote"),
    "site": ("plant", "warehouse", "office", "laboratory", "depot"),
    "body": ("court", "council", "regulator", "ministry", "tribunal"),
    "town": ("town", "port", "city", "district", "valley"),
    "crowd": ("residents", "workers", "drivers", "nurses", "farmers"),
    "buyer": ("customers", "owners", "shops", "reviewers", "dealers"),
    "paper": ("a report", "a letter", "a filing", "a notice", "an interview"),
    "thing": ("summit", "bridge", "harbour", "anchor", "beacon", "crown", "mill", "garden", "orchard", "compass"),
    "works": ("talks", "repairs", "traffic", "lights", "prices"),
    "moved": ("rose", "fell", "climbed", "slipped", "gained"),
    "early": ("early", "late", "morning", "afternoon", "thin"),
    "bought": ("bought", "sold", "sought", "rejected", "valued"),
    "stake": ("a stake", "a minority", "a third", "half", "a tenth"),
    "left": ("met", "joined", "advised", "sued", "praised"),
    "spoke": ("spoke", "stayed silent", "sounded calm", "took questions", "arrived late"),
    "made": ("unveiled", "withdrew", "tested", "repaired", "redesigned"),
    "fault": ("a faulty switch", "a cracked seal", "a wrong label", "a loose part", "a weak cable"),
    "opened": ("opened", "closed", "moved", "enlarged", "rented"),
    "walked": ("walked out", "marched", "gathered", "protested", "picketed"),
    "demand": ("higher pay", "shorter shifts", "safer tools", "more staff", "longer breaks"),
    "charge": ("price fixing", "late payments", "false claims", "a broken contract", "a data leak"),
    "adverb": ("sharply", "again", "slightly", "unexpectedly", "steadily"),
    "announced": ("reported", "announced", "disclosed", "confirmed", "revealed"),
    "flat": ("unchanged", "flat", "level", "stable", "the same"),
    # what investors want to rise, and what they want to fall
    "boon": ("profits", "sales", "orders", "earnings", "exports"),
    "bane": ("costs", "debts", "losses", "delays", "complaints"),
    "upped": ("rose", "grew", "climbed", "increased", "jumped"),
    "up": ("rise", "grow", "climb", "increase", "jump"),
    "upping": ("rising", "growing", "climbing", "increasing", "jumping"),
    "downed": ("fell", "dropped", "declined", "shrank", "narrowed"),
    "down": ("fall", "drop", "decline", "shrink", "narrow"),
    "downing": ("falling", "dropping", "declining", "shrinking", "narrowing"),
    "not_up": ("did not <up>", "failed to <up>", "were no longer <upping>", "stopped <upping>", "never <upped>"),
    "not_down": (
        "did not <down>",
        "failed to <down>",
        "were no longer <downing>",
        "stopped <downing>",
        "never <downed>",
    ),
    "prize": ("a contract", "an order", "a licence", "a patent", "a grant"),
    "blow": ("a lawsuit", "a fine", "a recall", "a strike", "a downgrade"),
    "won": ("won", "secured", "landed", "obtained", "received"),
    "lost": ("lost", "missed", "gave up", "was refused", "failed to win"),
    "escaped": ("escaped", "avoided", "averted", "was spared", "fended off"),
    "faced": ("faced", "suffered", "was hit by", "could not avoid", "expects"),
    "discussed": ("discussed", "was asked about", "described", "wrote about", "commented on"),
    "liked": ("welcomed", "cheered", "praised", "applauded", "liked"),
    "disliked": ("criticised", "feared", "disliked", "regretted", "attacked"),
    "noticed": ("discussed", "noted", "followed", "studied", "read about"),
    "backers": ("investors", "analysts", "shareholders", "fund managers", "brokers"),
    # what an item announces
    "next": ("next", "coming up", "to follow", "up next", "in the next piece"),
    "more": ("more on", "a closer look at", "background on", "the full story of", "a report on"),
    "earlier": ("earlier", "before this", "last time", "in the previous piece", "yesterday"),
}

SECTOR = {  # <sector>, by topic
    "energy": ("energy", "power", "electricity", "fuel", "gas"),
    "banking": ("banking", "finance", "lending", "credit", "savings"),
    "retail": ("retail", "shopping", "clothing", "fashion", "furniture"),
    "technology": ("technology", "software", "hardware", "computing", "robotics"),
    "health": ("health", "medicine", "diagnostics", "biotech", "pharmacy"),
    "transport": ("transport", "shipping", "rail", "freight", "aviation"),
    "food": ("food", "farming", "dairy", "baking", "grocery"),
    "media": ("media", "publishing", "film", "music", "broadcasting"),
}
AFFAIR = {  # <affair>, by kind of event
    "results": ("results", "quarterly figures", "the accounts", "trading figures", "the balance sheet"),
    "recall": ("recalls", "safety checks", "faulty goods", "withdrawals", "product defects"),
    "merger": ("mergers", "takeovers", "acquisitions", "buyouts", "tie-ups"),
    "hearing": ("hearings", "court cases", "lawsuits", "legal disputes", "trials"),
    "launch": ("launches", "new products", "premieres", "novelties", "first models"),
    "strike": ("strikes", "walkouts", "wage disputes", "labour protests", "union talks"),
    "expansion": ("expansion", "building plans", "new sites", "investment", "construction"),
    "appointment": ("appointments", "new managers", "changes at the top", "hirings", "board seats"),
}

# --- sentences that mention the event's people, companies, places and products

FRAMES: dict[str, tuple[str, ...]] = {
    "results": (
        "{org} <moved> # % in <early> trading",
        "shares in {org} <moved> # % in <early> trading",
        "{org} booked # million of <sector> revenue <period>",
        "the <sector> arm of {org} filed <paper> in {loc} <when>",
        "{per} , <role> of {org} , presented <affair> in {loc}",
        "{org} and {org2} both publish <affair> <soon>",
        "after <affair> , {org} <moved> more than {org2}",
    ),
    "recall": (
        "{org} recalled # units of the {prod} over <fault>",
        "<buyer> returned the {prod} because of <fault>",
        "<buyer> in {loc} found <fault> in the {prod}",
        "the {prod} was taken off the shelves in {loc} <when>",
        "{per} blamed {org} for <fault> in <paper>",
        "<fault> in the {prod} was traced to a <site> in {loc}",
        "the <body> told {org} to fix the {prod} <soon>",
    ),
    "merger": (
        "{org} <bought> <stake> of {org2}",
        "{org} is in talks to acquire {org2} , <paper> shows",
        "{per} negotiated with {org2} for {org} <when>",
        "{org2} turned down <stake> of {org} , its rival in <sector>",
        "the <body> in {loc} reviews the bid of {org} for {org2}",
        "bankers flew to {loc} as {org} <bought> <stake> of a <sector> firm",
        "{per} owns <stake> of {org} and <stake> of {org2}",
    ),
    "hearing": (
        "the <body> in {loc} heard {org} on <charge>",
        "{org} sued {org2} over <charge>",
        "{per} testified against {org} in a case of <charge>",
        "lawyers for {org} met {per} before the <body> in {loc}",
        "a <body> in {loc} questioned {per} about <charge>",
        "{org2} accuses {org} of <charge> in the <sector> market",
        "{per2} , a <job> , called the case of {org} weak",
    ),
    "launch": (
        "{org} <made> the {prod} in {loc} <when>",
        "the {prod} costs # crowns and goes on sale <soon>",
        "<buyer> queued for the {prod} in {loc}",
        "{per} , who designed the {prod} , <spoke> <when>",
        "the new {prod} competes with <sector> goods from {org2}",
        "<buyer> like the {prod} , <say> {per} in <paper>",
        "{org} <made> the {prod} for <buyer>",
    ),
    "strike": (
        "<crowd> <walked> at the <site> of {org} in {loc}",
        "<crowd> in {loc} asked {org} for <demand>",
        "{per} led <crowd> who <walked> in {loc}",
        "{org} offered <crowd> <demand> <when>",
        "the union in {loc} wants <demand> at {org}",
        "{per} , a <job> from {loc} , asked for <demand>",
        "<crowd> from {loc} to {loc2} <walked> <when>",
    ),
    "expansion": (
        "{org} <opened> a <site> in {loc} <when>",
        "the <site> moved from {loc} to {loc2} <when>",
        "the mayor of {loc} showed {org} a <site>",
        "{loc} lies # miles from the <site> of {org}",
        "{org} will hire # <crowd> in {loc} <soon>",
        "the <town> of {loc} sold land to {org} <when>",
        "{per} , mayor of {loc} , <spoke> at the <site>",
    ),
    "appointment": (
        "{per} became <role> of {org} <when>",
        "{org} named {per} its <role>",
        "{per} resigned as <role> of {org} <when>",
        "{per} , born in {loc} , was a <job> before {org}",
        "{per} replaced {per2} as <role> of {org}",
        "{org} hired {per} from {org2} as <role>",
        "{per} <left> {per2} , <paper> shows",
    ),
}
COMMON_FRAMES = (  # for any kind of event
    "<thing> <works> in {loc} began <when>",
    "<thing> <works> surprised <crowd> in {loc}",
    "{per} <left> {per2} at the <thing> in {loc}",
    "{per} <spoke> in {loc} <when>",
    "{per} told <crowd> about the <thing> <when>",
    "she met {per} , a <job> , in {loc} <when>",
    "{per} grew up in {loc} and studied with a <job>",
    "<crowd> in {loc} trust {per} , the <job>",
    "flights to {loc} were late <when> , <crowd> complained",
    "rain fell on {loc} and on {loc2} <when>",
    "in the <town> of {loc} , <crowd> repaired a <thing>",
    "the road from {loc} to {loc2} crosses a <town>",
    "{org} <bought> a <site> from {org2}",
    "{org} pays <crowd> # crowns an hour <when>",
    "the board of {org} meets <soon> , <paper> shows",
    "suppliers of {org} <moved> # % <when>",
    "<buyer> call the {prod} a <thing> of <sector>",
    "the {prod} sold # times <when>",
    "one <job> tested the {prod} for a <site>",
    "{per} drives to the <site> with the {prod}",
)
# The word that reveals the type is far from the name. {X} and {Y} are two entities of one type, <deed> is what entities
# of that type do, <sort> is the noun for the type.
FAR_FRAMES = (
    "{X} , <gap> , <deed>",
    "<crowd> say that {X} , <gap> , <deed>",
    "it was {X} that , <gap> , <deed>",
    "the <sort> to watch , <gap> , are {X} and {Y}",
    "two <sort> <when> , <gap> : {X} and {Y}",
    "{X} , <gap> , and not {Y} , <deed>",
    "<when> {X} and also {Y} , <gap> , <deed>",
    "of all <sort> , <crowd> , <gap> , prefer {X} to {Y}",
    "when {X} , <gap> , <deed> , <crowd> <walked>",
    "{X} , unlike {Y} , <gap> , <deed>",
)
GAPS = (
    "to the surprise of many",
    "as one <job> had expected",
    "for the second time in a row",
    "if one believes <paper>",
    "after a long and quiet summer",
)
DEEDS_OF = {
    "PER": ("caught a cold", "learned to swim", "lost a passport", "wrote a novel", "married in secret"),
    "ORG": (
        "issued new shares",
        "changed its auditor",
        "posted a small loss",
        "merged two divisions",
        "delayed its listing",
    ),
    "LOC": ("was under water", "elected a mayor", "lay under snow", "drew many tourists", "widened its streets"),
    "PROD": (
        "overheated in tests",
        "ran out of battery",
        "came in two colours",
        "weighed too much",
        "broke when dropped",
    ),
}
SORTS_OF = {
    "PER": ("guests", "authors", "candidates", "witnesses", "speakers"),
    "ORG": ("bidders", "lenders", "employers", "suppliers", "insurers"),
    "LOC": ("places", "suburbs", "resorts", "ports of call", "villages"),
    "PROD": ("gadgets", "models", "devices", "brands", "machines"),
}
PAIRS_OF = {"PER": ("per", "per2"), "ORG": ("org", "org2"), "LOC": ("loc", "loc2"), "PROD": ("prod", "prod2")}

SURROUNDINGS = (  # phrases before a statement, and after it
    ("on <day> ,", "in a <sector> note :", "as expected ,", "for the record :", "by one account ,"),
    ("on <day>", ", people familiar with it said", ", according to <paper>", ", the agency said", ", sources confirm"),
)

PROFILES = {
    "org": (
        "{org!} is a <sector> company from {loc}",
        "{org!} , known as {org?} , works in <sector>",
        "its <role> is {per!} , a former <job>",
        "it makes the {prod} for <buyer>",
        "its main rival in <sector> is {org2}",
    ),
    "per": (
        "{per!} is <role> of {org}",
        "{per?} , a <job> , lives in {loc}",
        "colleagues of {per} include {per2} , the <role>",
    ),
    "loc": (
        "{loc} is a <town> with # thousand inhabitants",
        "<crowd> in {loc} work for {org}",
        "the road from {loc} leads to {loc2} and its <thing>",
    ),
    "prod": (
        "the {prod} is made by {org} for <buyer>",
        "{org} builds the {prod} at a <site> in {loc}",
        "the {prod} was designed by {per} , a <job>",
    ),
}

# --- statements for investors. A claim has a quantity and a movement, which grammar.py puts in place of <Q> and <V>

CLAIMS = (
    "<Q> at {org} <V> <period>",
    "{org} <announced> that <Q> <V> <period>",
    "the <sector> firm {org} <announced> that <Q> <V>",
    "<Q> of the <sector> firm {org} <V>",
    "<Q> in {loc} <V> , {org} <announced>",
)
ASIDES = ("<Q> <V>", "<Q> in {loc} <V>", "<Q> <V> <period>", "<Q> in <sector> <V>", "<Q> for the {prod} <V>")
CONTRASTS = (
    "although ASIDE , MAIN",
    "MAIN , even though ASIDE",
    "ASIDE , but MAIN",
    "MAIN , although ASIDE",
    "while ASIDE , MAIN",
)
NEUTRAL = (
    "{org} will say <soon> whether <Q> <V>",
    "<Q> at {org} were <flat> <period>",
    "{org} changed the way it counts <Q> <period>",
    "<backers> asked whether <Q> at {org} <V>",
    "{org} will publish <Q> for <month> <soon>",
    "it is not known whether <Q> at {org} <V> <period>",
    "{org} <discussed> a rule for <Q> that <V>",
    "<backers> wait to hear from {org} if <Q> <V>",
    "<paper> lists <Q> of {org} that <V> or not",
    "{org} <discussed> <prize> and <blow>",
)
NEUTRAL_MAIN = ("<Q> at {org} were <flat> <period>", "the <sector> firm {org} left <Q> <flat> <period>")
DEEDS = {  # (verb class, object class) by polarity; the object alone does not reveal it
    1: (("<won>", "<prize>"), ("<escaped>", "<blow>")),
    -1: (("<lost>", "<prize>"), ("<faced>", "<blow>")),
}
DEED_FRAMES = (
    "{org} DEED OBJECT <when>",
    "the <sector> firm {org} DEED OBJECT",
    "in {loc} , {org} DEED OBJECT <when>",
    "{org} DEED OBJECT from the <body> in {loc}",
    "{org} DEED OBJECT over the {prod}",
)
OPINIONS = (
    "<backers> VERB the plans of {org} for <affair>",
    "<backers> in {loc} VERB the <sector> firm {org}",
    "<backers> VERB what {org} <announced> <when>",
    "at {org} , <backers> VERB the <role>",
    "<backers> VERB the {prod} of {org} <when>",
)
MAXIMS = {  # what investors like in general; only in articles; <Q> and <V> as in a claim
    1: (
        "<backers> like it when <Q> <V>",
        "it is good for a <sector> firm that <Q> <V>",
        "<backers> cheer if <Q> <V>",
        "<Q> that <V> are good news",
        "when <Q> <V> , shares gain",
    ),
    -1: (
        "<backers> dislike it when <Q> <V>",
        "it is bad for a <sector> firm that <Q> <V>",
        "<backers> worry if <Q> <V>",
        "<Q> that <V> are bad news",
        "when <Q> <V> , shares lose",
    ),
}
REACTIONS = {  # how the market reacts; only in articles, after a statement
    1: (
        "shares in {org} gained # % on the news",
        "<backers> <liked> the news",
        "that was good news for {org}",
        "the stock of {org} went up at once",
        "<backers> raised their targets for {org}",
    ),
    0: (
        "shares in {org} hardly moved on the news",
        "<backers> only <noticed> the news",
        "that was no news for {org}",
        "the stock of {org} stayed where it was",
        "<backers> kept their targets for {org}",
    ),
    -1: (
        "shares in {org} lost # % on the news",
        "<backers> <disliked> the news",
        "that was bad news for {org}",
        "the stock of {org} went down at once",
        "<backers> cut their targets for {org}",
    ),
}

# --- items: a headline, what happened, and which story it announces

HEADLINES = {
    "results": ("{org} <announced> <affair>", "<affair> : {org} in figures", "{org} shows <affair>"),
    "recall": ("{org} calls back the {prod}", "<fault> in the {prod} of {org}", "{org} and <affair> : the {prod}"),
    "merger": ("{org} <bought> {org2}", "{org} in <affair> with {org2}", "<affair> : {org} looks at {org2}"),
    "hearing": ("{org} before the <body> in {loc}", "<charge> : {org} answers", "{org} and {org2} in <affair>"),
    "launch": ("{org} <made> the {prod}", "the {prod} by {org} : <affair>", "{org} shows the {prod} in {loc}"),
    "strike": ("<crowd> <walked> at {org}", "{org} hears calls for <demand> in {loc}", "<affair> at {org} in {loc}"),
    "expansion": ("{org} <opened> a <site> in {loc}", "<affair> : {org} goes to {loc}", "a <site> for {org} in {loc}"),
    "appointment": ("{per} is <role> of {org}", "<affair> at {org} : {per}", "{org} picks {per} as <role>"),
}
DESKS = (
    "from the <sector> desk",
    "filed under <sector>",
    "<sector> news <when>",
    "our <sector> page",
    "a <sector> story",
)
ANNOUNCEMENTS = {  # {org2} is the announced company, {org3} one that is mentioned but not announced
    "company": (
        "<next> : <more> {org2} , <earlier> it was {org3}",
        "<earlier> we wrote about {org3} , <next> <more> {org2}",
        "<next> , the desk turns from {org3} to {org2}",
        "we leave {org3} , and <next> comes <more> {org2}",
        "<next> we bring <more> {org2} and no longer follow {org3}",
    ),
    "beat": (
        "<next> : <affair> in <sector> , <earlier> it was {org3}",
        "<earlier> we wrote about {org3} , <next> <more> <sector> and <affair>",
        "<next> , the desk turns from {org3} to <affair> in <sector>",
        "we leave {org3} , and <next> comes <sector> with <affair>",
        "<next> we bring <more> <affair> in <sector> and no longer follow {org3}",
    ),
}
