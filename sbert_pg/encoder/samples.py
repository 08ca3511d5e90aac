"""Ordinary texts on which a precision is held against fp32 at conversion.

The probes are chosen to tell encoders apart and are odd on purpose; these are what applications
store: titles, questions, product texts, paragraphs. Written for this project.
"""

from __future__ import annotations

_PROSE = """
The library keeps one table for each collection and joins them at query time. When a book is
lent out, the row stays where it is and only its status changes; a nightly job writes the
reminders. Readers asked for a list of what they had borrowed before, so a history table was
added last spring, with an index on the reader and the day.

Hikers reach the lake by a path of six kilometres from the village. The first half climbs
steadily through beech forest, the second crosses open meadows where cattle graze in summer.
There is no shelter above the tree line, and the weather turns within minutes; carry water, a
map and something warm even on a clear morning. The last bus back leaves at seven.

In the second quarter revenue rose by eleven percent to 48.2 million, mainly because of the new
service contracts in northern Europe. Costs for freight and energy fell slightly. The board
expects the margin to stay between fourteen and fifteen percent for the year and will propose a
dividend of 0.85 per share at the annual meeting in May.

Aspirin reduces fever and inflammation by blocking the enzymes that make prostaglandins. It also
keeps platelets from clumping, which is why small daily doses are given after a heart attack.
Children with a viral infection should not take it, since a rare and dangerous swelling of the
brain and liver has been seen in that group.

Die Werkstatt liegt im Hinterhof eines alten Mietshauses. Seit vierzig Jahren werden hier Geigen
gebaut und repariert, und noch immer riecht es nach Leim, Fichtenholz und Kaffee. Wer ein
Instrument bestellt, wartet etwa zwei Jahre und darf in dieser Zeit so oft zusehen, wie er mag.

La recette demande peu de choses : des tomates bien mûres, un oignon doux, de l'huile d'olive et
du pain de la veille. On laisse reposer le tout une heure au frais avant de servir, et personne
ne s'est jamais plaint qu'il en restât pour le lendemain.

El tren nocturno sale de la estación central a las diez y media y llega a la costa antes del
amanecer. Los viajeros que llevan bicicleta tienen que reservar plaza con dos días de
antelación, porque solo hay un vagón preparado para ellas.
"""
_PARAGRAPHS = tuple(" ".join(paragraph.split()) for paragraph in _PROSE.split("\n\n"))

SAMPLE_TEXTS: tuple[str, ...] = (
    "wireless noise cancelling headphones",
    "red running shoes size 42",
    "How can I cancel my subscription?",
    "What is the capital of Australia?",
    "best way to learn to play the guitar as an adult",
    "Why does my card payment keep being declined abroad?",
    "postgres index not used with order by and limit",
    "My order arrived damaged and I would like a refund.",
    "The meeting was moved to Thursday afternoon.",
    "She sells sea shells by the sea shore.",
    "A man is playing a flute on the street.",
    "Someone plays a musical instrument outdoors.",
    "Two dogs run across a field of snow.",
    "The stock market fell sharply after the announcement.",
    "Photosynthesis turns light into chemical energy.",
    "Rust prevents data races at compile time.",
    "import numpy as np; x = np.linspace(0, 1, 50)",
    "ERROR 1045 (28000): Access denied for user 'root'@'localhost'",
    "Breakfast included, free parking, pets welcome.",
    "Vegan lentil soup with coconut milk and lime",
    "The Treaty of Westphalia ended the Thirty Years' War in 1648.",
    "E = mc^2 relates energy to mass.",
    "Apartment for rent: 3 rooms, balcony, 74 m2, 1,150 EUR/month",
    "Patients should fast for eight hours before the test.",
    "thread-safe queue with a bounded size",
    "Is it going to rain in Lisbon this weekend?",
    "Ich hätte gern einen Tisch für vier Personen.",
    "Où se trouve la gare la plus proche ?",
    "¿Cuánto cuesta el billete de ida y vuelta?",
    "Il museo è chiuso il lunedì.",
    "このカメラは夜景も綺麗に撮れます。",
    "Библиотека открыта с девяти до шести.",
    "Kargo ne zaman teslim edilecek?",
    *_PARAGRAPHS,
    " ".join(_PARAGRAPHS[:2]),
    " ".join(_PARAGRAPHS[2:5]),
    " ".join(_PARAGRAPHS),
)
