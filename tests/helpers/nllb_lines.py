"""Mined pairs as NLLB has them, in all languages of the card, with planted noise."""

import gzip
from collections.abc import Iterable
from pathlib import Path

from marco_train.config.curation import CARD_LANGUAGES

ENGLISH = (
    "You can buy the tickets at the station or online before you travel.",
    "The library is open every day except Sunday, and entry is free for children.",
    "Our neighbours planted 25 apple trees in the garden behind the old school.",
    "Heavy rain is expected in the mountains tomorrow, so please take warm clothes with you.",
)
OTHERS = {
    "ar": (
        "يمكنك شراء التذاكر من المحطة أو عبر الإنترنت قبل السفر.",
        "المكتبة مفتوحة كل يوم ما عدا الأحد، والدخول مجاني للأطفال.",
        "زرع جيراننا ٢٥ شجرة تفاح في الحديقة خلف المدرسة القديمة.",
        "من المتوقع هطول أمطار غزيرة في الجبال غدا، لذا يرجى أخذ ملابس دافئة معك.",
    ),
    "az": (
        "Biletləri səfərdən əvvəl stansiyadan və ya internetdən ala bilərsiniz.",
        "Kitabxana bazar günü istisna olmaqla hər gün açıqdır və uşaqlar üçün giriş pulsuzdur.",
        "Qonşularımız köhnə məktəbin arxasındakı bağda 25 alma ağacı əkdilər.",
        "Sabah dağlarda güclü yağış gözlənilir, ona görə də özünüzlə isti paltar götürün.",
    ),
    "bn": (
        "আপনি ভ্রমণের আগে স্টেশন থেকে বা অনলাইনে টিকিট কিনতে পারেন।",
        "রবিবার ছাড়া প্রতিদিন গ্রন্থাগার খোলা থাকে এবং শিশুদের জন্য প্রবেশ বিনামূল্যে।",
        "আমাদের প্রতিবেশীরা পুরনো স্কুলের পিছনের বাগানে ২৫টি আপেল গাছ লাগিয়েছেন।",
        "আগামীকাল পাহাড়ে ভারী বৃষ্টির সম্ভাবনা আছে, তাই দয়া করে সঙ্গে গরম কাপড় নিন।",
    ),
    "cs": (
        "Jízdenky si můžete koupit na nádraží nebo předem na internetu.",
        "Knihovna je otevřena každý den kromě neděle a vstup pro děti je zdarma.",
        "Naši sousedé zasadili 25 jabloní v zahradě za starou školou.",
        "Zítra se v horách očekává silný déšť, proto si s sebou vezměte teplé oblečení.",
    ),
    "de": (
        "Die Fahrkarten können Sie am Bahnhof oder vorab im Internet kaufen.",
        "Die Bibliothek ist täglich außer sonntags geöffnet, und für Kinder ist der Eintritt frei.",
        "Unsere Nachbarn haben im Garten hinter der alten Schule 25 Apfelbäume gepflanzt.",
        "Morgen wird in den Bergen starker Regen erwartet, nehmen Sie also warme Kleidung mit.",
    ),
    "el": (
        "Μπορείτε να αγοράσετε τα εισιτήρια στον σταθμό ή στο διαδίκτυο πριν από το ταξίδι.",
        "Η βιβλιοθήκη είναι ανοιχτή κάθε μέρα εκτός Κυριακής και δωρεάν για τα παιδιά.",
        "Οι γείτονές μας φύτεψαν 25 μηλιές στον κήπο πίσω από το παλιό σχολείο.",
        "Αύριο αναμένεται έντονη βροχή στα βουνά, γι' αυτό πάρτε μαζί σας ζεστά ρούχα.",
    ),
    "es": (
        "Puedes comprar los billetes en la estación o por internet antes de viajar.",
        "La biblioteca abre todos los días excepto el domingo y la entrada es gratuita para niños.",
        "Nuestros vecinos plantaron 25 manzanos en el jardín detrás de la vieja escuela.",
        "Mañana se esperan fuertes lluvias en las montañas, así que lleva ropa de abrigo.",
    ),
    "fr": (
        "Vous pouvez acheter les billets à la gare ou en ligne avant le voyage.",
        "La bibliothèque est ouverte chaque jour sauf le dimanche, et gratuite pour les enfants.",
        "Nos voisins ont planté 25 pommiers dans le jardin derrière la vieille école.",
        "De fortes pluies sont attendues demain en montagne, prenez donc des vêtements chauds.",
    ),
    "he": (
        "אפשר לקנות את הכרטיסים בתחנה או באינטרנט לפני הנסיעה.",
        "הספרייה פתוחה בכל יום חוץ מיום ראשון, והכניסה לילדים חופשית.",
        "השכנים שלנו שתלו 25 עצי תפוח בגינה שמאחורי בית הספר הישן.",
        "מחר צפוי גשם כבד בהרים, ולכן כדאי לקחת אתכם בגדים חמים.",
    ),
    "hu": (
        "A jegyeket az állomáson vagy az utazás előtt az interneten veheti meg.",
        "A könyvtár vasárnap kivételével minden nap nyitva van, és a gyerekeknek ingyenes.",
        "A szomszédaink 25 almafát ültettek a régi iskola mögötti kertbe.",
        "Holnap a hegyekben erős eső várható, ezért kérjük, vigyen magával meleg ruhát.",
    ),
    "id": (
        "Anda bisa membeli tiket di stasiun atau secara daring sebelum bepergian.",
        "Perpustakaan buka setiap hari kecuali hari Minggu, dan anak-anak bisa masuk gratis.",
        "Tetangga kami menanam 25 pohon apel di kebun belakang gedung sekolah yang lama.",
        "Besok diperkirakan hujan deras di pegunungan, jadi silakan bawa pakaian hangat.",
    ),
    "it": (
        "Puoi comprare i biglietti alla stazione o su internet prima del viaggio.",
        "La biblioteca è aperta tutti i giorni tranne la domenica e l'ingresso è gratuito.",
        "I nostri vicini hanno piantato 25 meli nel giardino dietro la vecchia scuola.",
        "Domani sono previste forti piogge in montagna, quindi porta con te abiti caldi.",
    ),
    "ja": (
        "切符は駅で買うか、出発前にインターネットで買うことができます。",
        "図書館は日曜日を除いて毎日開いており、子どもは無料で入場できます。",
        "近所の人たちは古い学校の裏の庭に25本のリンゴの木を植えました。",
        "明日は山で大雨が予想されるので、暖かい服を持ってきてください。",
    ),
    "kk": (
        "Билеттерді вокзалдан немесе сапар алдында интернеттен сатып алуға болады.",
        "Кітапхана жексенбіден басқа күн сайын ашық, ал балалар үшін кіру тегін.",
        "Біздің көршілеріміз ескі мектептің артындағы бақшаға 25 алма ағашын отырғызды.",
        "Ертең тауда қатты жаңбыр күтіледі, сондықтан өзіңізбен бірге жылы киім алыңыз.",
    ),
    "ko": (
        "표는 역에서 사거나 여행 전에 인터넷으로 살 수 있습니다.",
        "도서관은 일요일을 제외하고 매일 열려 있으며 어린이는 무료로 입장할 수 있습니다.",
        "우리 이웃들은 오래된 학교 뒤의 정원에 사과나무 25그루를 심었습니다.",
        "내일 산에는 많은 비가 예상되므로 따뜻한 옷을 가져오시기 바랍니다.",
    ),
    "ms": (
        "Anda boleh membeli tiket di stesen atau dalam talian sebelum perjalanan.",
        "Perpustakaan dibuka setiap hari kecuali Ahad, dan kanak-kanak boleh masuk secara percuma.",
        "Jiran kami telah menanam 25 pokok epal di kebun yang terletak di belakang sekolah lama.",
        "Hujan lebat dijangka turun di kawasan pergunungan esok, jadi sila bawa pakaian tebal.",
    ),
    "ne": (
        "तपाईं यात्रा गर्नुअघि स्टेशनमा वा अनलाइन टिकट किन्न सक्नुहुन्छ।",
        "आइतबार बाहेक पुस्तकालय हरेक दिन खुला हुन्छ र बालबालिकाका लागि प्रवेश निःशुल्क छ।",
        "हाम्रा छिमेकीहरूले पुरानो विद्यालय पछाडिको बगैंचामा २५ वटा स्याउका बोट रोपे।",
        "भोलि पहाडमा भारी वर्षा हुने अनुमान छ, त्यसैले कृपया न्याना लुगा लिएर जानुहोस्।",
    ),
    "nl": (
        "Je kunt de kaartjes op het station of vooraf op internet kopen.",
        "De bibliotheek is elke dag behalve zondag open en de toegang is gratis voor kinderen.",
        "Onze buren hebben 25 appelbomen geplant in de tuin achter de oude school.",
        "Morgen wordt er zware regen verwacht in de bergen, dus neem warme kleren mee.",
    ),
    "pl": (
        "Bilety można kupić na dworcu lub przed podróżą przez internet.",
        "Biblioteka jest otwarta codziennie oprócz niedzieli, a wstęp dla dzieci jest bezpłatny.",
        "Nasi sąsiedzi posadzili 25 jabłoni w ogrodzie za starą szkołą.",
        "Jutro w górach spodziewany jest silny deszcz, więc proszę zabrać ze sobą ciepłe ubrania.",
    ),
    "pt": (
        "Você pode comprar as passagens na estação ou pela internet antes da viagem.",
        "A biblioteca abre todos os dias, exceto aos domingos, e é gratuita para crianças.",
        "Nossos vizinhos plantaram 25 macieiras no jardim atrás da velha escola.",
        "Amanhã são esperadas fortes chuvas nas montanhas, por isso leve roupas quentes.",
    ),
    "ro": (
        "Puteți cumpăra biletele din gară sau pe internet înainte de călătorie.",
        "Biblioteca este deschisă în fiecare zi, cu excepția duminicii, iar copiii intră gratuit.",
        "Vecinii noștri au plantat 25 de meri în grădina din spatele școlii vechi.",
        "Mâine sunt așteptate ploi puternice la munte, așa că luați cu voi haine groase.",
    ),
    "ru": (
        "Билеты можно купить на вокзале или заранее через интернет.",
        "Библиотека открыта каждый день, кроме воскресенья, и вход для детей бесплатный.",
        "Наши соседи посадили 25 яблонь в саду за старой школой.",
        "Завтра в горах ожидается сильный дождь, поэтому возьмите с собой тёплую одежду.",
    ),
    "th": (
        "คุณสามารถซื้อตั๋วที่สถานีหรือทางออนไลน์ก่อนเดินทางได้",
        "ห้องสมุดเปิดทุกวันยกเว้นวันอาทิตย์ และเด็กเข้าชมได้โดยไม่เสียค่าใช้จ่าย",
        "เพื่อนบ้านของเราปลูกต้นแอปเปิล 25 ต้นในสวนหลังโรงเรียนเก่า",
        "พรุ่งนี้คาดว่าจะมีฝนตกหนักบนภูเขา ดังนั้นโปรดนำเสื้อผ้าที่อบอุ่นไปด้วย",
    ),
    "tr": (
        "Biletleri istasyondan ya da yolculuktan önce internetten alabilirsiniz.",
        "Kütüphane pazar günü hariç her gün açıktır ve çocuklar için giriş ücretsizdir.",
        "Komşularımız eski okulun arkasındaki bahçeye 25 elma ağacı dikti.",
        "Yarın dağlarda şiddetli yağmur bekleniyor, bu yüzden yanınıza sıcak giysiler alın.",
    ),
    "uk": (
        "Квитки можна купити на вокзалі або заздалегідь через інтернет.",
        "Бібліотека відкрита щодня, крім неділі, і вхід для дітей безкоштовний.",
        "Наші сусіди посадили 25 яблунь у саду за старою школою.",
        "Завтра в горах очікується сильний дощ, тому візьміть із собою теплий одяг.",
    ),
    "ur": (
        "آپ سفر سے پہلے اسٹیشن سے یا انٹرنیٹ پر ٹکٹ خرید سکتے ہیں۔",
        "لائبریری اتوار کے علاوہ ہر روز کھلی رہتی ہے اور بچوں کا داخلہ مفت ہے۔",
        "ہمارے پڑوسیوں نے پرانے اسکول کے پیچھے باغ میں ۲۵ سیب کے درخت لگائے۔",
        "کل پہاڑوں میں شدید بارش کی توقع ہے، اس لیے براہ کرم گرم کپڑے ساتھ لے جائیں۔",
    ),
    "vi": (
        "Bạn có thể mua vé tại nhà ga hoặc trên mạng trước khi đi.",
        "Thư viện mở cửa hằng ngày trừ chủ nhật và trẻ em được vào cửa miễn phí.",
        "Hàng xóm của chúng tôi đã trồng 25 cây táo trong khu vườn phía sau ngôi trường cũ.",
        "Ngày mai dự báo có mưa lớn ở vùng núi, vì vậy hãy mang theo quần áo ấm.",
    ),
    "zh": (
        "您可以在车站购票，也可以在出发前上网购买。",
        "图书馆除星期日外每天开放，儿童可以免费入场。",
        "我们的邻居在老学校后面的花园里种了25棵苹果树。",
        "明天山区预计有大雨，所以请您随身携带保暖的衣服。",
    ),
}
"""What the sentences of `ENGLISH` say, by language."""
MAIL = "Please write to anna@example.org before you come to the library on Monday."
COOKIES = "This page uses cookies, so that the library can count how many readers it has."
NEAR = ENGLISH[3].replace(", so please", " and so please")
NUM_GOOD, NUM_LINES = 4, 15


def lines_of(code: str) -> list[bytes]:
    """The lines of a file: four good pairs, then noise of each kind."""
    said = OTHERS[code]
    foreign = OTHERS["de" if code == "fr" else "fr"]
    pairs = [
        *zip(ENGLISH, said, strict=True),
        (ENGLISH[0], said[0]),  # equal
        (NEAR, said[3]),  # nearly equal
        (ENGLISH[1], foreign[1]),  # the other side in another language
        (foreign[0], said[0]),  # English in another language
        ("Good day!", said[0]),  # too few words
        (COOKIES, said[1]),  # of a policy
        (ENGLISH[2].replace("25", "36"), said[2]),  # another number
        (f"{ENGLISH[3]} {ENGLISH[1]} {ENGLISH[0]} {ENGLISH[2][:24]}", said[0]),  # far longer
        (MAIL, f"{said[3]} anna@example.org"),  # personal data
    ]
    lines = [line_of(code, n, *pair) for n, pair in enumerate(pairs)]
    broken = [b"one\ttwo\t1.1\n", b"\xff\xfe" + lines[0]]
    return [*lines, *broken]


def line_of(code: str, number: int, english: str, other: str) -> bytes:
    """One line; the earlier ones have the higher scores."""
    sides = [other, english] if is_first(code) else [english, other]
    crawl, address = "crawl-data/x", f"https://www.site{number}.example.org/page"
    columns = [*sides, f"{1.3 - number / 100:.2f}", "0.98", "0.97", crawl, address, crawl, address]
    return ("\t".join(columns) + "\n").encode()


def is_first(code: str) -> bool:
    """Whether a language stands before English in the names of files and in lines."""
    return CARD_LANGUAGES[code][0] < CARD_LANGUAGES["en"][0]


def name_of(code: str) -> str:
    """The name of a language's file."""
    names = sorted((CARD_LANGUAGES[code][0], CARD_LANGUAGES["en"][0]))
    return f"{'-'.join(names)}.gz"


def write_nllb(directory: Path, codes: Iterable[str] = OTHERS) -> Path:
    """Write the files of languages."""
    directory.mkdir(parents=True, exist_ok=True)
    for code in codes:
        with gzip.open(directory / name_of(code), "wb") as file:
            file.writelines(lines_of(code))
    return directory
