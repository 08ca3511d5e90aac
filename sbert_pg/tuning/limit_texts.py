"""Small sets of texts that show where encoders of sentences break; written for this project.

Each line is a text, another that says the same, and one that does not though it looks alike.
"""

from __future__ import annotations

from typing import NamedTuple


class Triple(NamedTuple):
    """A text, one that means the same, and one that means something else."""

    text: str
    same: str
    other: str


def _triples(block: str) -> tuple[Triple, ...]:
    return tuple(Triple(*map(str.strip, line.split("|"))) for line in block.strip().splitlines())


TRIPLES: dict[str, tuple[Triple, ...]] = {
    "word order": _triples(
        """
        The dog bit the man. | The man was bitten by the dog. | The man bit the dog.
        Anna lent Peter her car. | Peter borrowed Anna's car. | Peter lent Anna his car.
        The bank sued the city. | The city was sued by the bank. | The city sued the bank.
        Fly from Rome to Oslo. | A flight to Oslo that leaves Rome. | Fly from Oslo to Rome.
        The teacher thanked the pupil. | The pupil was thanked by the teacher. | The pupil thanked the teacher.
        Convert euros to dollars. | Turn an amount in euros into dollars. | Convert dollars to euros.
        The buyer owes the seller money. | The seller is still owed money by the buyer. | The seller owes the buyer money.
        Cats fear that dog. | That dog is feared by cats. | That dog fears cats.
        The host blames the guest. | It is the guest whom the host blames. | The guest blames the host.
        Export from Excel to CSV. | Save an Excel sheet as CSV. | Export from CSV to Excel.
        The red team beat the blue team. | The blue team lost to the red team. | The blue team beat the red team.
        Maria is taller than Tom. | Tom is shorter than Maria. | Tom is taller than Maria.
        """
    ),
    "negation": _triples(
        """
        The food was good. | We enjoyed the meal. | The food was not good.
        The drug is safe in pregnancy. | Pregnant women can take the drug. | The drug is not safe in pregnancy.
        Smoking is allowed here. | You may smoke in this place. | Smoking is not allowed here.
        The server is reachable. | One can connect to the server. | The server is not reachable.
        The contract was signed. | Both parties put their names to the contract. | The contract was never signed.
        He passed the exam. | His exam was a success. | He did not pass the exam.
        Dogs are welcome. | You can bring your dog. | No dogs, please.
        The patient has a fever. | The patient's temperature is raised. | The patient has no fever.
        The refund was approved. | They agreed to give the money back. | The refund was not approved.
        I would buy it again. | I am happy with my purchase. | I would not buy it again.
        The road is open. | Traffic can use the road. | The road is no longer open.
        She likes the new office. | The new office pleases her. | She does not like the new office.
        """
    ),
    "numbers and units": _triples(
        """
        The box weighs 2 kg. | The weight of the box is 2000 grams. | The box weighs 20 kg.
        The meeting starts at 3 pm. | The meeting begins at 15:00. | The meeting starts at 5 pm.
        It costs 1,200 euros. | The price is twelve hundred euros. | It costs 12,000 euros.
        The wall is 1.5 m high. | The height of the wall is 150 cm. | The wall is 15 m high.
        Take 2 tablets a day. | The daily dose is two tablets. | Take 8 tablets a day.
        The company was founded in 1987. | It was 1987 when the company began. | The company was founded in 1978.
        The rate rose by 5 percent. | The rate is a twentieth higher. | The rate rose by 50 percent.
        The trip takes 90 minutes. | The journey lasts an hour and a half. | The trip takes 19 minutes.
        Version 2.10 fixes the bug. | The error is gone in release 2.10. | Version 2.1 fixes the bug.
        A flat of 74 square metres. | The apartment measures 74 m2. | A flat of 174 square metres.
        It was minus 10 degrees. | Ten degrees below zero were measured. | It was plus 10 degrees.
        The loan runs for 12 months. | The credit lasts one year. | The loan runs for 12 years.
        """
    ),
    "names and rare words": _triples(
        """
        Anna Kowalska signed the lease. | The lease bears the signature of Anna Kowalska. | Anna Kowalczyk signed the lease.
        Order part XR-4410. | Part number XR-4410 has to be bought. | Order part XR-4401.
        Mr Brandt called. | There was a call by Mr Brandt. | Mr Brand called.
        The ship left Tromsø. | A ship departed from Tromsø. | The ship left Tórshavn.
        Give the child amoxicillin. | Amoxicillin should be given to the child. | Give the child azithromycin.
        Flight KL1234 is late. | There is a delay of flight KL1234. | Flight KL1243 is late.
        Invoice 20391 is unpaid. | Nobody has paid invoice 20391. | Invoice 20931 is unpaid.
        The bassoonist was ill. | The player of the bassoon was sick. | The bassist was ill.
        Jiří Novák teaches physics. | Physics is taught by Jiří Novák. | Jiří Nowak teaches physics.
        Error E-1057 appeared. | The machine showed error E-1057. | Error E-1075 appeared.
        We met in Aarau. | Aarau was where we met. | We met in Aargau.
        A colony of cormorants. | Cormorants that nest together. | A colony of corvids.
        """
    ),
    "polysemy": _triples(
        """
        She sat on the bank of the river. | She rested by the water. | She sat in the bank and waited for the clerk.
        The bat flew out of the cave. | A flying mammal left its hole. | The bat broke when he hit the ball.
        He fixed the mouse with new batteries. | The pointing device of his computer works again. | He caught the mouse with a piece of cheese.
        The crane lifted the steel beam. | A building machine raised heavy metal. | The crane waded through the marsh.
        The court ruled against him. | The judges decided that he was wrong. | The court was too wet to play tennis.
        The plant needs more light. | The green thing in the pot should stand at the window. | The plant produces more light bulbs.
        The spring in the mattress is broken. | A metal coil of the bed has snapped. | The spring was cold, and the flowers came late.
        The pitcher was full of milk. | There was milk in the jug. | The pitcher threw a fast ball.
        The match went out in the wind. | The small flame died. | The match was lost in the last minute.
        The current was too strong to swim. | The water pulled the swimmers away. | The current was too strong for the fuse.
        He drew the curtain. | He closed the drapes. | He drew a curtain with a pencil.
        The seal barked on the rocks. | A sea animal made noise at the shore. | The seal on the letter was broken.
        """
    ),
    "other languages and scripts": _triples(
        """
        Where is the station? | Wo ist der Bahnhof? | Wo ist das Krankenhaus?
        I would like a refund. | Ich möchte mein Geld zurück. | Ich möchte ein Glas Wasser.
        The museum is closed on Mondays. | Le musée est fermé le lundi. | Le magasin est ouvert le lundi.
        My luggage is lost. | Mes bagages sont perdus. | Mes amis sont arrivés.
        The soup is cold. | La sopa está fría. | La cerveza está fría.
        How do I change my password? | ¿Cómo cambio mi contraseña? | ¿Cómo cambio una rueda?
        The train is late. | Поезд опаздывает. | Самолёт приземлился.
        It is raining today. | Сегодня идёт дождь. | Сегодня светит солнце.
        Two coffees, please. | コーヒーを二つお願いします。 | ビールを二つお願いします。
        The library opens at nine. | 图书馆九点开门。 | 超市九点关门。
        The child has a fever. | الطفل مصاب بالحمى. | الطفل يلعب في الحديقة.
        The key is under the mat. | Kluczyk leży pod wycieraczką. | Kot leży pod stołem.
        """
    ),
    "spelling": _triples(
        """
        How do I cancel my subscription? | how do i cancle my subscribtion | How do I renew my subscription?
        My parcel has not arrived. | my parsel has not arived | My parcel has arrived.
        Which laptop is best for students? | wich labtop is best for studens | Which desk is best for students?
        The screen of my phone is broken. | teh screan of my fone is brokken | The screen of my phone is bright.
        Symptoms of pneumonia | symtoms of newmonia | Symptoms of anaemia
        Apply for a driving licence | aply for a driveing lisense | Apply for a fishing licence
        Recipe for chocolate cake | recipie for choclate cake | Recipe for cheese cake
        Restaurants in Copenhagen | resturants in copenhagn | Museums in Copenhagen
        The definition of entropy | teh defintion of entropie | The definition of enthalpy
        Return a pair of shoes | retrun a pear of shoos | Return a pair of gloves
        Insurance for my bicycle | insurence for my bycicle | Insurance for my house
        Change the address of delivery | chnage teh adress of delivry | Change the time of delivery
        """
    ),
    "domain terms": _triples(
        """
        The patient had a myocardial infarction. | The patient had a heart attack. | The patient had a cerebral infarction.
        The lessee may terminate on notice. | The tenant can end the contract in writing. | The lessor may terminate on notice.
        Hypertension should be treated. | High blood pressure needs therapy. | Hypotension should be treated.
        The defendant was acquitted. | The accused was found not guilty. | The defendant was convicted.
        Administer the drug intravenously. | Give the medicine into a vein. | Administer the drug orally.
        The bond trades below par. | The price of the bond is under its face value. | The bond trades above par.
        The fracture was reduced. | The broken bone was set. | The fracture was overlooked.
        The index was rebuilt concurrently. | The index was made again beside running writes. | The index was dropped concurrently.
        The firm deleveraged. | The company paid back debt. | The firm took on debt.
        Epistaxis in children | Nosebleeds in young patients | Otitis in children
        The will was probated. | The court accepted the testament. | The will was contested.
        The pod was evicted. | The scheduler removed the container from its node. | The pod was started.
        """
    ),
}  # fmt: skip

#: What follows a long beginning, where the cut is: a question, its answer, another one.
AT_THE_END: tuple[Triple, ...] = _triples(
    """
    Where is the key? | The key is under the blue pot. | The dog sleeps on the sofa.
    Who pays for the repair? | The landlord pays for the repair. | The garden faces south.
    When does the warranty end? | The warranty ends after two years. | The box is made of paper.
    Which fee is charged? | A fee of ten euros is charged. | The staff were very friendly.
    What must not be taken with it? | It must not be taken with alcohol. | The tablets are white.
    How is it cleaned? | It is cleaned with warm water. | The lamp has a long cable.
    """
)

#: What can be done about each, from the cheapest on.
ADVICE: dict[str, str] = {
    "word order": "rerank the first rows with a cross-encoder, which reads both texts together",
    "negation": "rerank; do not decide on yes or no by similarity alone",
    "numbers and units": "put numbers in columns and filter by them; hybrid finds them as written",
    "names and rare words": "hybrid: the words arm matches names and identifiers to the letter",
    "polysemy": "embed more context (a heading, the field); rerank",
    "other languages and scripts": "take a multilingual encoder; one column for all languages",
    "spelling": "a larger or multilingual encoder; correct the spelling of questions",
    "domain terms": "tune on your own pairs; an encoder of the field; hybrid",
    "long texts": "passages_of: cut texts into passages instead of losing their end",
}
